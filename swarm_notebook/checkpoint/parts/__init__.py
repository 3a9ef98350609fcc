"""A part of a model, as the model's own transformers class: `partial` says which, `loading` how.

`passthrough` tries that nothing but its blocks changes hidden states; `single` reads one tensor.
"""
