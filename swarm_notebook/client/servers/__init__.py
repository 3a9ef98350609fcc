"""Who serves which blocks, how they behave, and which way to go."""
