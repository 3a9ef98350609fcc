"""Receives adapters: an upload is bounded while it arrives, then checked, then loaded.

Bytes that are arriving are memory, too: those of one peer and of all peers together are counted,
and an upload that stalls is given up.
"""

from __future__ import annotations

import asyncio
import importlib
import re
from typing import Any

import torch
from hivemind.p2p import PeerID
from hivemind.proto import runtime_pb2
from safetensors.torch import save

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import protocol, tensors
from swarm_notebook.net.streams import Stream
from swarm_notebook.net.traffic import COPIES, Traffic
from swarm_notebook.server.adapters.config import parse_configs
from swarm_notebook.server.adapters.file import MAX_HEADER_BYTES, MAX_TENSORS, parse_safetensors
from swarm_notebook.server.adapters.upload import Recipe, Upload
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.requests import Limits
from swarm_notebook.server.engine.scheduler import Kind, Task
from swarm_notebook.server.engine.worker import ComputeThread
from swarm_notebook.server.rpc import fields, messages
from swarm_notebook.server.rpc.codec import Codec
from swarm_notebook.server.rpc.messages import Received
from swarm_notebook.server.rpc.parse import parse_blocks

# Metadata, which comes with every part.
_EXTRA_BYTES = 64 << 20

_PREFIX = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,7}", re.ASCII)


class AdapterUploads:
    """Takes uploads in; `handle` serves one stream."""

    def __init__(self, engine: Engine, compute: ComputeThread, limits: Limits, codec: Codec):
        self._engine, self._compute, self._limits = engine, compute, limits
        self._codec = codec
        self._accepted = engine.adapters.limits
        self._largest = self._accepted.bytes + MAX_HEADER_BYTES + _EXTRA_BYTES
        # Of its own: a file may be larger than anything else that comes.
        self.traffic = Traffic(4 * COPIES * self._largest, COPIES * self._largest)

    async def handle(self, stream: Stream, peer: PeerID) -> None:
        """Receive an adapter, let the torch thread check and load it, say what it takes."""
        name = peer.to_base58()
        message = await messages.receive(stream, self._largest)
        # Neither thread may wait for this: the loop and torch's have other sessions to serve.
        upload = await asyncio.to_thread(parse_upload, message, self._limits, self._accepted.rank)
        del message
        await asyncio.to_thread(importlib.import_module, "peft")
        task = Task(Kind.STATELESS, name)
        job = self._compute.submit(self._engine.load_adapter, name, upload, task=task)
        size, derived = await messages.result(job, stream)
        taken = sum(tensor.numel() * tensor.itemsize for tensor in derived.values())
        packed = await self._codec.run(taken, _packed_file, derived) if upload.derive else []
        await messages.send(stream, packed, {"ok": True, "bytes": size})


def _packed_file(derived: dict[str, torch.Tensor]) -> list[runtime_pb2.Tensor]:
    return [tensors.pack(torch.frombuffer(bytearray(save(derived)), dtype=torch.uint8))]


def parse_upload(message: Received, limits: Limits, max_rank: int) -> Upload:
    """An upload: metadata, and one tensor with the bytes of a safetensors file."""
    blocks = parse_blocks(message.uid, limits)
    metadata = protocol.unpack_metadata(message.metadata)
    key = fields.adapter({"id": metadata.get("adapter"), "version": metadata.get("version")})
    prefix = fields.text(metadata, "prefix") or ""
    if not _PREFIX.fullmatch(prefix):
        raise BadRequest(f"prefix: {prefix!r}, expected a module's name like 'model.layers'")
    if len(message.tensors) != 1:
        raise BadRequest(f"adapter file: {len(message.tensors)} tensors, expected one")
    if not tensors.is_file(message.tensors[0]):
        raise BadRequest("adapter file: expected one uint8 tensor, the bytes of a safetensors file")
    return Upload(
        id=key[0],
        version=key[1],
        recipe=Recipe(blocks, prefix, parse_configs(metadata.get("configs"), max_rank)),
        tensors=parse_safetensors(tensors.unpack(message.tensors[0])),
        derive=_names(metadata.get("derive")),
    )


def _names(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset()
    if (
        not isinstance(value, (list, tuple))
        or len(value) > MAX_TENSORS
        or not all(isinstance(name, str) for name in value)
    ):
        raise BadRequest("derive: expected names of parameters")
    return frozenset(value)
