"""Attention over the caches of many sessions: laid end to end, or found in pages."""
