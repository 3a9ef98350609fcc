"""Who serves which blocks, how they behave, and which route is the quickest."""
