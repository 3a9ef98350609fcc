"""An uploaded adapter: its config and its parameters, checked as far as the bytes alone allow.

Whether the parameters are those of the model's modules is for `adapters` to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import protocol, tensors
from swarm_notebook.server import adapter_file, fields
from swarm_notebook.server.adapter_config import TunerConfig, parse_configs
from swarm_notebook.server.exchange import Received
from swarm_notebook.server.requests import Limits, parse_blocks

_PREFIX = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,7}", re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """What the modules of an adapter follow from.

    Attributes:
        blocks: the blocks that it is for.
        prefix: what the notebook's model calls the list of blocks.
    """

    blocks: tuple[int, int]
    prefix: str
    configs: tuple[TunerConfig, ...]


@dataclass(frozen=True)
class Upload:
    """One state of an adapter.

    Attributes:
        id, version: how requests name it.
        tensors: the parameters by name; views of the received bytes.
        derive: names of parameters that follow from the base weights.
    """

    id: str
    version: int
    recipe: Recipe
    tensors: dict[str, torch.Tensor]
    derive: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        return self.derive | self.tensors.keys()


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
    return Upload(
        id=key[0],
        version=key[1],
        recipe=Recipe(blocks, prefix, parse_configs(metadata.get("configs"), max_rank)),
        tensors=adapter_file.read(tensors.unpack(message.tensors[0])),
        derive=_names(metadata.get("derive")),
    )


def _names(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset()
    if (
        not isinstance(value, (list, tuple))
        or len(value) > adapter_file.MAX_TENSORS
        or not all(isinstance(name, str) for name in value)
    ):
        raise BadRequest("derive: expected names of parameters")
    return frozenset(value)
