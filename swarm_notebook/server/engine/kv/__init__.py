"""Keys and values: how many a session may hold, and where they lie."""
