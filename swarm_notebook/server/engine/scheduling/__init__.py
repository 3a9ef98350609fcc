"""What the torch thread runs next: its work by kind and client, in batches and in pieces."""
