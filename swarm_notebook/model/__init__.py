"""The remote model: the model's own transformers class whose blocks ask the swarm.

`skeleton.build` makes it; `blocks` is what becomes of a decoder layer; `runner` decides what
travels while the model runs; `cache` is the handle that transformers passes around for the keys
and values that live on the servers.
"""
