"""Whether a model runs on some machines, and how fast, before a byte of its weights is fetched.

`shape` reads a model's config and its files' headers, `machines` knows what cards and Macs can do
(`measure` finds it out for this one), `placement` lays blocks on machines and counts seconds, and
`plan` asks them all and shows the result. `simulation` lets a whole swarm work in simulated time.
"""
