"""A server in its swarm: what it announces, which blocks it takes, neighbours and membership."""
