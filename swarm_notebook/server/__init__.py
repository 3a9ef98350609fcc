"""The server: hosts a contiguous run of a model's blocks for everybody in the swarm.

`app` puts the parts together, and `process` holds them. They run in one asyncio loop for the
network and one thread for torch. A request goes `rpc.handler` or `rpc.session` (stream) ->
`rpc.parse` (validation) -> `engine.kv.budget` (room in the cache) -> `engine.scheduling` (the torch
thread, and what it runs next) -> `engine.span` (the blocks, with their `kv.cache`) and back.
`adapters` holds what notebooks upload, `presence` tells the swarm what is hosted.

`server` imports neither `client` nor `model`; `engine` knows nothing of the network.
"""
