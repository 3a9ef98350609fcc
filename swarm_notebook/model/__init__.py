"""The remote model: the model's own transformers class whose blocks ask the swarm.

`skeleton.build` makes it. `blocks` is what stands where the decoder layers were and who looks at
it; `calls` is one run of the model, from its first block to its last, with its gradients;
`generation` is the handle that transformers passes around for the keys and values on the servers,
and how tokens are guessed; `adapters` is what PEFT put into the blocks. `home` brings blocks home.
"""
