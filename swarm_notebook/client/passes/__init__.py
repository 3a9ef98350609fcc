"""Passes without a cache, forward and backward, each over a stream of its own per server."""
