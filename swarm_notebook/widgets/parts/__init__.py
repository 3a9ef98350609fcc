"""What the live views are made of: their common base, scripts, throttle, static HTML, tokens."""
