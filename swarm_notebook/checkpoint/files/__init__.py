"""Where configs, tokenizers and weights come from: folders, the Hub, GGUF files, the demo model.

`source.resolve` finds a model. Its weights are read tensor by tensor (`weights`), whatever holds
them: safetensors, a GGUF file (`gguf`), a checkpoint that was quantised before (`quantised`,
`words`), or nothing at all (`dummy`).
"""
