"""Multiplying tokens by weights: the kernel that is fastest here, and weights in few bits."""
