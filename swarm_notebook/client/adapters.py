"""Getting a notebook's adapter weights to the servers that need them, when they have changed.

An adapter travels as PEFT's own config and one safetensors file per server with the parameters of
the blocks that this server computes. A server that lost it (or never had it) says so, and gets it
again; otherwise a version is sent once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from hivemind.proto import runtime_pb2
from safetensors import SafetensorError
from safetensors.torch import load, save

from swarm_notebook.client.passes.call import ANSWER_SLACK, call, server_name
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.errors import AdapterMissing, BadRequest, ServerFailed, Unsupported
from swarm_notebook.net import protocol, tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """One state of the adapters that are active in a model's remote blocks.

    Attributes:
        id: stays the same while the configs do; the server keeps one state per id.
        version: grows whenever a weight changed.
        configs: PEFT's config of each active adapter, as JSON, by adapter name.
        prefix: name of the model's list of blocks, such as ``model.layers``.
        weights: parameters by block and by name in the model.
        derived: names of parameters that the server computes from the real base weights.
    """

    id: str
    version: int
    configs: Mapping[str, str]
    prefix: str
    weights: Mapping[int, Mapping[str, torch.Tensor]]
    derived: frozenset[str] = frozenset()

    def key(self) -> dict[str, str | int]:
        """How a request names this state."""
        return {"id": self.id, "version": self.version}

    def part(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """The parameters of blocks ``[start, end)`` by name."""
        return {
            name: tensor
            for block in range(start, end)
            for name, tensor in self.weights.get(block, {}).items()
        }


async def ensure_uploaded(
    directory: Directory, segment: RouteSegment, adapter: Adapter | None
) -> None:
    """Send a server the adapter's present state, unless it got it before."""
    if adapter is None:
        return
    if not segment.span.extended:
        raise Unsupported(
            f"{server_name(segment)} is a Petals server, which runs no adapters from notebooks; "
            "use servers started with `swarm-notebook serve`"
        )
    # The groups of a batch come here at once: the first uploads, the others wait for it.
    async with directory.upload_locks[segment.peer]:
        known = directory.uploaded.get((segment.peer, adapter.id))
        if known != (adapter.version, segment.span.start, segment.span.end):
            await upload(directory, segment, adapter)


async def with_adapter(
    directory: Directory,
    segment: RouteSegment,
    adapter: Adapter | None,
    work: Callable[[], Awaitable[T]],
) -> T:
    """Do ``work`` on a server that has the adapter's present state."""
    await ensure_uploaded(directory, segment, adapter)
    try:
        return await work()
    except AdapterMissing:
        if adapter is None:
            raise
        directory.uploaded.pop((segment.peer, adapter.id), None)
        await ensure_uploaded(directory, segment, adapter)
        return await work()


async def upload(
    directory: Directory, segment: RouteSegment, adapter: Adapter
) -> dict[str, torch.Tensor]:
    """Send a server what it needs to run this adapter in all blocks that it hosts.

    Returns:
        the parameters that the server derived from its weights, by name.
    """
    span = segment.span
    whole = RouteSegment(span, span.start, span.end)
    part = adapter.part(span.start, span.end)
    derive = sorted(adapter.derived & part.keys())
    sent = {name: tensor.contiguous() for name, tensor in part.items() if name not in derive}
    metadata = {
        "adapter": adapter.id,
        "version": adapter.version,
        "configs": dict(adapter.configs),
        "prefix": adapter.prefix,
        **({"derive": derive} if derive else {}),
    }
    file = torch.frombuffer(bytearray(save(sent)), dtype=torch.uint8)
    answer = await call(
        directory,
        whole,
        protocol.RPC_ADAPTER,
        [file],
        metadata,
        always=1,
        most=ANSWER_SLACK + 8 * sum(part[name].numel() for name in derive),
    )
    directory.uploaded[segment.peer, adapter.id] = (adapter.version, span.start, span.end)
    if not derive:
        return {}
    if len(answer.tensors) != 1:
        raise ServerFailed(f"{server_name(segment)} sent no initial values for {derive[0]}")
    derived = _read_derived(answer.tensors[0], server_name(segment))
    if sorted(derived) != derive:
        raise ServerFailed(f"{server_name(segment)} sent other initial values than asked for")
    return derived


def _read_derived(packed: runtime_pb2.Tensor, server: str) -> dict[str, torch.Tensor]:
    try:
        if not tensors.is_file(packed):
            raise ServerFailed(f"{server} sent initial values that are no file")
        return load(packed.buffer)
    except (BadRequest, SafetensorError) as error:
        raise ServerFailed(f"{server} sent no readable initial values: {error}") from None
