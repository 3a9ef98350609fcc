"""What a swarm is and did, as tables, plain text and HTML: status, routes, traces, costs."""
