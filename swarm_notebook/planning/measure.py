"""What this machine can do: its memory, and what products with weights reach on it.

Measured for some seconds, with as many threads as a server would take. On a CPU blocks of three
sizes are run: those that have hardly any weights tell what a block costs beside reading them, and
what the others take longer for one token is the bandwidth that products reach, on average.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable

from swarm_notebook.planning.machines import (
    GPU_BLOCK_SECONDS,
    GPU_REACHED,
    Machine,
)

# Blocks beyond most processors' cache, of models with 0.1 and 0.5 billion weights; and some with
# hardly any.
_READ_BYTES, _MOST_BLOCKS, _WIDTHS = 128 << 20, 30, (64, 576, 1024)
_CONTEXT, _PROMPT_TOKENS = 64, 256
_TRIES = 9
_SIZE = 2048


def this_machine(name: str = "this machine") -> Machine:
    """Measure this machine: its card if there is one, else its CPU."""
    import torch

    return _card(name) if torch.cuda.is_available() else _cpu(name)


def _cpu(name: str) -> Machine:
    import psutil
    import torch

    with torch.inference_mode():
        blocks = [_Blocks(width) for width in _WIDTHS]
        works = [*(one.step for one in blocks), blocks[-1].prompt]
        seconds = [math.inf] * len(works)
        # In turns: what else the machine does meanwhile slows all of them.
        for _ in range(1 + _TRIES):
            for index, work in enumerate(works):
                seconds[index] = min(seconds[index], timeit.timeit(work, number=1))
    empty, *steps = (taken / one.count for taken, one in zip(seconds, blocks, strict=False))
    # What is beside the weights is a part of the time at most, however noisy the machine is.
    empty = min(empty, *(step / 2 for step in steps))
    reading = [(step - empty) / one.nbytes for step, one in zip(steps, blocks[1:], strict=True)]
    return Machine(
        name,
        psutil.virtual_memory().total,
        len(reading) / sum(reading),
        2 * _PROMPT_TOKENS * blocks[-1].nbytes / 4 / seconds[-1],
        "cpu",
        f"measured with {torch.get_num_threads()} threads",
        1.0,
        empty,
    )


class _Blocks:
    """Blocks of a Llama in float32, more than a processor's cache holds.

    Attributes:
        nbytes: of one of them.
    """

    def __init__(self, width: int):
        import torch
        from transformers import AutoModel, DynamicCache, LlamaConfig

        self._config = LlamaConfig(
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_attention_heads=width // 64,
            num_hidden_layers=1,
            vocab_size=8,
        )
        self._one = AutoModel.from_config(self._config, dtype=torch.float32).eval()
        self.nbytes = 4 * sum(one.numel() for one in self._one.layers.parameters())
        self.count = min(_MOST_BLOCKS, -(-_READ_BYTES // self.nbytes))
        self._config.num_hidden_layers = self.count
        self._model = AutoModel.from_config(self._config, dtype=torch.float32).eval()
        states = torch.zeros(1, _PROMPT_TOKENS, width)
        self._token, self._prompt = states[:, :1], states
        self._cache = DynamicCache(config=self._config)
        self._model(inputs_embeds=states[:, :_CONTEXT], past_key_values=self._cache, use_cache=True)

    def step(self) -> None:
        """One token through all of them."""
        self._model(inputs_embeds=self._token, past_key_values=self._cache, use_cache=True)
        self._cache.crop(-1)

    def prompt(self) -> None:
        """A prompt through one of them."""
        self._one(inputs_embeds=self._prompt, use_cache=False)


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
