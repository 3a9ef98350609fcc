"""Taking messages apart and putting them together without holding up the event loop.

What is small is done at once, as going to another thread costs more than it does. What is large
goes to a thread of the server's own. There is one, as all of it waits for the one torch thread
anyway, and many large messages at once must not take the cores from that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from swarm_notebook.net.wire import tensors
from swarm_notebook.net.wire.message import PackedTensor
from swarm_notebook.server.rpc import messages

R = TypeVar("R")


class Codec:
    """Runs what packs and unpacks tensors; `close` ends its thread. Belongs to the loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="codec")

    async def run(self, size: int, function: Callable[..., R], *arguments: Any) -> R:
        """Call a function of tensors that have ``size`` bytes together.

        Raises: what the function raises.
        """
        if size <= tensors.INLINE_BYTES:
            return function(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *arguments)

    async def pack(self, outputs: Iterable[torch.Tensor], compression: int) -> list[PackedTensor]:
        """Tensors for the wire; only floating point is compressed (see `messages.pack`)."""
        outputs = list(outputs)
        size = sum(output.numel() * output.itemsize for output in outputs)
        return await self.run(size, messages.pack, outputs, compression)

    def close(self) -> None:
        """End the thread, after what it is at; nothing more may be run."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def packed_bytes(packed: Iterable[PackedTensor]) -> int:
    """How many bytes of tensors a message carries."""
    return sum(len(tensor.buffer) for tensor in packed)
