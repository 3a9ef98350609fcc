"""Receives adapters: an upload is bounded while it arrives, then checked, then loaded.

Bytes that are arriving are memory, too: those of one peer and of all peers together are counted,
and an upload that stalls is given up.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata

from hivemind.p2p import PeerID

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.streams import Stream
from swarm_notebook.net.wire.traffic import COPIES, Traffic
from swarm_notebook.server.adapters.file import MAX_HEADER_BYTES, parse_safetensors
from swarm_notebook.server.adapters.layers import MAX_TEXT_BYTES, parse_description
from swarm_notebook.server.adapters.upload import Upload, recipe_of
from swarm_notebook.server.engine.engine import Engine
from swarm_notebook.server.engine.requests import Limits
from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task
from swarm_notebook.server.engine.scheduling.worker import ComputeThread
from swarm_notebook.server.rpc import fields, messages
from swarm_notebook.server.rpc.messages import Received
from swarm_notebook.server.rpc.parse import parse_blocks

# The description, and metadata, which comes with every part.
_EXTRA_BYTES = MAX_TEXT_BYTES + (48 << 20)


class AdapterUploads:
    """Takes uploads in; `handle` serves one stream."""

    traffic: Traffic

    def __init__(self, engine: Engine, compute: ComputeThread, limits: Limits):
        self._engine, self._compute, self._limits = engine, compute, limits
        self._accepted = engine.adapters.limits
        self._largest = self._accepted.bytes + MAX_HEADER_BYTES + _EXTRA_BYTES
        # Of its own: a file may be larger than anything else that comes.
        self.traffic = Traffic(4 * COPIES * self._largest, COPIES * self._largest)

    async def handle(self, stream: Stream, peer: PeerID) -> None:
        """Receive an adapter, let the torch thread check and load it, say what it takes."""
        name = peer.to_base58()
        message = await messages.receive(stream, self._largest)
        # Neither thread may wait for this: the loop and torch's have other sessions to serve.
        upload = await asyncio.to_thread(parse_upload, message, self._limits)
        del message
        await asyncio.to_thread(importlib.import_module, "peft")
        task = Task(Kind.STATELESS, name)
        job = self._compute.submit(self._engine.load_adapter, name, upload, task=task)
        size = await messages.result(job, stream)
        await messages.send(stream, [], {"ok": True, "bytes": size})


def parse_upload(message: Received, limits: Limits) -> Upload:
    """An upload: metadata, and two tensors of bytes, a safetensors file and a description."""
    blocks = parse_blocks(message.uid, limits)
    metadata = protocol.unpack_metadata(message.metadata)
    name, version = fields.adapter(
        {"id": metadata.get("adapter"), "version": metadata.get("version")}
    )
    if len(message.tensors) != 2 or not all(map(tensors.is_file, message.tensors)):
        raise BadRequest("adapter: expected two uint8 tensors, a safetensors file and what it is")
    file, text = map(tensors.unpack, message.tensors)
    found = parse_safetensors(file)
    raw = text.numpy().tobytes()
    layers = parse_description(raw, blocks, found, importlib.metadata.version("peft"))
    return Upload(name, version, recipe_of(blocks, raw, found), layers, found)
