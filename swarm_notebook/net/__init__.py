"""What both sides of the wire share: the node, the records, the protocol, tensors and streams.

`net` imports neither `client` nor `server`; importing it imports hivemind (and so torch), which
takes seconds: callers import it lazily.
"""
