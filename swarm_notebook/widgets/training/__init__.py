"""A training run as the monitor shows it: its record, curves and view, and Trainer's callback."""
