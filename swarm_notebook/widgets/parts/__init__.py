"""What the live views are made of: their common base, scripts, pace, static HTML, tokens."""
