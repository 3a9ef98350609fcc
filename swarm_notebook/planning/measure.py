"""What this machine can do: its memory, and what products with weights reach on it.

Measured for a second or two, with as many threads as a server would take: long products for the
arithmetic, products with one token for the bandwidth, and blocks that have hardly any weights for
what a block costs beside them.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from swarm_notebook.planning.machines import (
    GPU_BLOCK_SECONDS,
    GPU_REACHED,
    Machine,
)

# Beyond any processor's cache, in pieces as weights are.
_READ_BYTES, _SIZE = 256 << 20, 2048
_LONG_TOKENS = 256
_TRIES = 5
_BLOCKS, _CONTEXT = 8, 64


def this_machine(name: str = "this machine") -> Machine:
    """Measure this machine: its card if there is one, else its CPU."""
    import torch

    return _card(name) if torch.cuda.is_available() else _cpu(name)


def _cpu(name: str) -> Machine:
    import psutil
    import torch

    with torch.inference_mode():
        weights = [torch.randn(_SIZE, _SIZE) for _ in range(_READ_BYTES // (4 * _SIZE * _SIZE))]
        token, long = torch.randn(1, _SIZE), torch.randn(_LONG_TOKENS, _SIZE)
        reading = _best(lambda: [torch.nn.functional.linear(token, one) for one in weights])
        bandwidth = 4 * _SIZE * _SIZE * len(weights) / reading
        operations = (
            2
            * _LONG_TOKENS
            * _SIZE
            * _SIZE
            / _best(lambda: torch.nn.functional.linear(long, weights[0]))
        )
        block = _block_seconds()
    return Machine(
        name,
        psutil.virtual_memory().total,
        bandwidth,
        operations,
        "cpu",
        f"measured with {torch.get_num_threads()} threads",
        1.0,
        block,
    )


def _block_seconds() -> float:
    """Seconds of a step through a block with hardly any weights."""
    import torch
    from transformers import AutoModel, DynamicCache, LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=_BLOCKS,
        vocab_size=8,
    )
    model = AutoModel.from_config(config).eval()
    states = torch.zeros(1, _CONTEXT, 64)
    cache = DynamicCache(config=config)
    model(inputs_embeds=states, past_key_values=cache, use_cache=True)

    def step() -> None:
        model(inputs_embeds=states[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return _best(step) / _BLOCKS


def _card(name: str) -> Machine:
    import torch

    with torch.inference_mode():
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        long = torch.randn(8 * _SIZE, 2 * _SIZE, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(2 * _SIZE, 2 * _SIZE, device="cuda", dtype=torch.bfloat16)

        def copy() -> None:
            target.copy_(source)
            torch.cuda.synchronize()

        def multiply() -> None:
            torch.nn.functional.linear(long, weight)
            torch.cuda.synchronize()

        # Copied bytes are read and written. What is given is what copying reaches.
        bandwidth = 2 * source.numel() / _best(copy)
        operations = 2 * long.numel() * weight.shape[0] / _best(multiply)
    memory = torch.cuda.get_device_properties(0).total_memory
    return Machine(
        name,
        memory,
        bandwidth / GPU_REACHED,
        operations,
        "gpu",
        f"measured on {torch.cuda.get_device_name(0)}",
        GPU_REACHED,
        GPU_BLOCK_SECONDS,
    )


def _best(work: Callable[[], object]) -> float:
    """Seconds of the best of some tries, after one to warm up."""
    work()
    return min(timeit.repeat(work, number=1, repeat=_TRIES))
