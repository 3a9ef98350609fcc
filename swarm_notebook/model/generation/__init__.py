"""What `generate` needs: a cache whose keys and values lie elsewhere, and guessed tokens."""
