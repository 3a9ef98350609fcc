"""The notebook's side of the network: who serves what, the best route, and surviving losses.

Everything here that is a coroutine runs on the one background loop of `client.loop`; `model` and
`swarm` call it from the user's thread through `LoopThread.run`.
"""
