"""Weights in few bits under a budget: what an error costs, who gets how many, and what is left."""
