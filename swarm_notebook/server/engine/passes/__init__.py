"""Passes without a cache: forward and back, at once or in pieces, in the dtype asked for."""
