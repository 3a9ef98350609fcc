"""The server: hosts a contiguous run of a model's blocks for everybody in the swarm.

One process, one asyncio loop for the network and one thread for torch. A request goes
`handler`/`session` (stream) -> `requests` (validation) -> `memory` (room in the cache) ->
`compute` (the torch thread) -> `span` (the blocks, with their `cache`) and back. `serve` puts the
parts together, `throughput` measures them at start, `announce` tells the swarm.

`server` never imports `client` or `model`.
"""
