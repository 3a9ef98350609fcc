"""Receiving adapters: an upload is bounded while it arrives, then checked, then handed over.

Bytes that are arriving are memory, too: those of one peer and of all peers together are counted,
and an upload that stalls is given up.
"""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from hivemind.p2p import PeerID
from safetensors.torch import save

from swarm_notebook.errors import CacheFull
from swarm_notebook.net import tensors
from swarm_notebook.net.streams import Stream
from swarm_notebook.server import adapter_file, exchange
from swarm_notebook.server.compute import ComputeThread
from swarm_notebook.server.engine import Engine
from swarm_notebook.server.requests import Limits
from swarm_notebook.server.schedule import Kind, Task
from swarm_notebook.server.uploads import parse_upload

# Metadata, which comes with every part.
_EXTRA_BYTES = 64 << 20


class Intake:
    """Takes uploads in; `handle` serves one stream."""

    def __init__(self, engine: Engine, compute: ComputeThread, limits: Limits):
        self._engine, self._compute, self._limits = engine, compute, limits
        self._accepted = engine.adapters.limits
        self._largest = self._accepted.bytes + adapter_file.MAX_HEADER_BYTES + _EXTRA_BYTES
        self._arriving: Counter[str] = Counter()

    async def handle(self, stream: Stream, peer: PeerID) -> None:
        """Receive an adapter, let the torch thread check and load it, say what it takes."""
        name = peer.to_base58()
        with self._counted(name) as arrived:
            message = await exchange.receive(stream, self._largest, arrived)
            # Neither thread may wait for this: the loop and torch's have other sessions to serve.
            upload = await asyncio.to_thread(
                parse_upload, message, self._limits, self._accepted.rank
            )
            del message
            await asyncio.to_thread(importlib.import_module, "peft")
            task = Task(Kind.PASS, name)
            job = self._compute.submit(self._engine.load_adapter, name, upload, task=task)
            size, derived = await exchange.result(job, stream)
        packed = []
        if upload.derive:
            file = torch.frombuffer(bytearray(save(derived)), dtype=torch.uint8)
            packed = [tensors.pack(file)]
        await exchange.send(stream, packed, {"ok": True, "bytes": size})

    @contextmanager
    def _counted(self, peer: str) -> Iterator[Callable[[int], None]]:
        mine = 0

        def arrived(size: int) -> None:
            nonlocal mine
            mine += size
            self._arriving[peer] += size
            of_all = sum(self._arriving.values())
            if self._arriving[peer] > self._largest or of_all > 4 * self._largest:
                raise CacheFull(
                    f"too many adapters are arriving at once ({self._arriving[peer]} bytes from "
                    f"this peer, {of_all} in all); send them one after the other"
                )

        try:
            yield arrived
        finally:
            self._arriving[peer] -= mine
            if not self._arriving[peer]:
                del self._arriving[peer]
