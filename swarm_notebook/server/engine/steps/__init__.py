"""Steps of sessions: alone, as a batch, replayed from a CUDA graph, a prompt in chunks."""
