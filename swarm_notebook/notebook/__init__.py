"""What IPython sees: the magics, their arguments, and imports that are warmed up meanwhile."""
