"""What a server computes: blocks, their KV caches, batches of sessions, gradients.

Nothing here knows the wire: no hivemind, no asyncio streams, no `net`. Requests come as plain
objects (`requests`) and run in the one torch thread (`scheduling.worker`).
"""
