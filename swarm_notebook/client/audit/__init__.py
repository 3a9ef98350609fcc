"""Audits of what servers answer: drawn at random, replayed elsewhere, compared, decided."""
