"""Servers on this machine: the embedded swarm, one process of it, and lending memory to a swarm."""
