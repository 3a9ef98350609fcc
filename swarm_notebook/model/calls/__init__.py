"""One run of the model: what is asked of the swarm, what is handed out, gradients."""
