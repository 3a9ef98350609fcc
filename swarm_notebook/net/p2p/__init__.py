"""libp2p and hivemind as they must be for a peer to live long: the daemon, its sockets, the loop.

`fixes` mends hivemind from outside; `net.node` imports it before anything of hivemind runs.
"""
