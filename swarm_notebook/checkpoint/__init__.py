"""Where a model's config, tokenizer and weights come from, and how a part of it is loaded.

`files.source.resolve` finds a model; `parts.partial.load_blocks` loads what a server hosts, and
`parts.partial.load_edges` what a notebook keeps: embeddings, final norm, head.
"""
