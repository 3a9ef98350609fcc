"""Getting a notebook's adapter weights to the servers that need them, when they have changed.

An adapter travels as a description of PEFT's layers and one safetensors file per server with the
tensors of the blocks that this server hosts. A server that lost it (or never had it) says so, and
gets it again; otherwise a version is sent once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import save

from swarm_notebook.client.passes.call import ANSWER_SLACK, CallAnswer, call, server_name
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.errors import AdapterMissing, ServerGone, Unsupported
from swarm_notebook.net.wire import protocol


@dataclass(frozen=True)
class AdaptedBlock:
    """What PEFT has put into one block (`model.tuner_layers`).

    Attributes:
        text: a description as JSON, in which tensors have names.
        tensors: their values by name. One that several blocks share is one object.
        trained: the names of those that want gradients.
    """

    text: str
    tensors: Mapping[str, torch.Tensor]
    trained: frozenset[str]


@dataclass(frozen=True)
class Adapter:
    """One state of the adapters that are active in a model's remote blocks.

    Attributes:
        id: stays the same while the layers do; the server keeps one state per id.
        version: grows whenever a weight changed.
        peft: the version of PEFT that has made the layers.
        blocks: what is in each block.
        by_row: what PEFT tells its layers for one call, one value for each row of a batch.
    """

    id: str
    version: int
    peft: str
    blocks: Mapping[int, AdaptedBlock]
    by_row: Mapping[str, list[Any]] = field(default_factory=dict)

    def key(self) -> dict[str, str | int]:
        """How a request names this state."""
        return {"id": self.id, "version": self.version}

    def for_rows(self, rows: slice | Sequence[int]) -> Adapter:
        def some(values: list[Any]) -> list[Any]:
            return values[rows] if isinstance(rows, slice) else [values[row] for row in rows]

        by_row = {name: some(values) for name, values in self.by_row.items()}
        return replace(self, by_row=by_row) if by_row else self

    def trained(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """What wants gradients in blocks ``[start, end)``, by block and name."""
        return {
            f"{index}.{name}": block.tensors[name]
            for index, block in self.blocks.items()
            if start <= index < end
            for name in sorted(block.trained)
        }

    def packed(self, start: int, end: int) -> tuple[bytes, bytes]:
        """A safetensors file for blocks ``[start, end)``, and what is in it."""
        names: dict[int, str] = {}
        tensors: dict[str, torch.Tensor] = {}
        parts = []
        for index, block in self.blocks.items():
            if not start <= index < end:
                continue
            sources = {}
            for name, tensor in block.tensors.items():
                source = sources[name] = names.setdefault(id(tensor), f"{index}.{name}")
                tensors[source] = tensor
            told = {"tensors": sources, "trained": sorted(block.trained)}
            parts.append(f'"{index}":{{"layers":{block.text},{json.dumps(told)[1:]}')
        text = f'{{"peft":{json.dumps(self.peft)},"blocks":{{{",".join(parts)}}}}}'
        return save(tensors), text.encode()


async def ensure_uploaded(
    directory: Directory, segment: RouteSegment, adapter: Adapter | None
) -> None:
    """Send a server the adapter's present state, unless it got it before."""
    if adapter is None:
        return
    if not segment.span.extended:
        raise Unsupported(
            f"{server_name(segment)} is a Petals server, which runs no adapters from notebooks; "
            f"bring its blocks home: swarm.own(slice({segment.start}, {segment.end})), or use "
            "servers started with `swarm-notebook serve`"
        )
    # The groups of a batch come here at once: the first uploads, the others wait for it.
    async with directory.upload_locks[segment.peer]:
        if directory.is_left(segment.peer):
            # Most likely while another group sent it: the same is not found out once more.
            reason = directory.avoided(segment.peer)
            raise ServerGone(f"{server_name(segment)} is no longer used: {reason}")
        known = directory.uploaded.get((segment.peer, adapter.id))
        if known != (adapter.version, segment.span.start, segment.span.end):
            await upload(directory, segment, adapter)


async def call_with_adapter(
    directory: Directory, segment: RouteSegment, adapter: Adapter | None, *request: Any, **how: Any
) -> CallAnswer:
    """`passes.call.call` of a server that has the adapter's present state."""
    await ensure_uploaded(directory, segment, adapter)
    try:
        return await call(directory, segment, *request, **how)
    except AdapterMissing:
        if adapter is None:
            raise
        directory.uploaded.pop((segment.peer, adapter.id), None)
        await ensure_uploaded(directory, segment, adapter)
        return await call(directory, segment, *request, **how)


async def upload(directory: Directory, segment: RouteSegment, adapter: Adapter) -> None:
    """Send a server what it needs to run this adapter in all blocks that it hosts."""
    span = segment.span
    whole = RouteSegment(span, span.start, span.end)
    metadata = {"adapter": adapter.id, "version": adapter.version}
    packed = await asyncio.to_thread(adapter.packed, span.start, span.end)
    sent = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in packed]
    await call(directory, whole, protocol.RPC_ADAPTER, sent, metadata, always=2, most=ANSWER_SLACK)
    directory.uploaded[segment.peer, adapter.id] = (adapter.version, span.start, span.end)
