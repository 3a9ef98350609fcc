"""One session of a server, alone and among others, whose outputs are to be the same to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from swarm_notebook.client.session.history import Pass
from swarm_notebook.client.session.session import Given

STEPS = 12


class Session:
    """A prompt and some steps of random states, the same for a seed."""

    def __init__(self, connection: Any, size: int, seed: int, prompt: int, dtype: torch.dtype):
        noise = torch.Generator().manual_seed(seed)
        self._hidden = torch.randn(1, prompt + STEPS, size, generator=noise).to(dtype)
        self._connection, self._prompt = connection, prompt
        self._session = connection.session()
        self.outputs: list[torch.Tensor] = []

    async def run(self) -> None:
        last = self._connection.num_blocks
        begin, end = 0, self._prompt
        while end <= self._hidden.shape[1]:
            hidden = self._hidden[:, begin:end]
            self._session.begin(Pass(begin, end - begin, {0: hidden}), Given())
            outputs = await self._session.step(0, last)
            self.outputs.append(outputs.states[last - 1].clone())
            begin, end = end, end + 1
        self._session.close()


def outputs_of(
    connection: Any, size: int, others: Sequence[int], dtype: torch.dtype, prompt: int = 100
) -> list[torch.Tensor]:
    """What a session gets while others, with prompts of these lengths, are served."""
    mine = Session(connection, size, 0, prompt, dtype)
    company = [
        Session(connection, size, seed, length, dtype) for seed, length in enumerate(others, 1)
    ]

    async def all_of_them() -> None:
        await asyncio.gather(*(session.run() for session in (*company, mine)))

    connection.network.run(all_of_them())
    return mine.outputs
