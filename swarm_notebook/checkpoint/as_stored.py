"""Matrices that stay in memory as their file has them, unpacked for each operation.

GGUF files and checkpoints of GPTQ and AWQ say what a number of theirs stands for in bits that can
be kept. All others are read by transformers, which decides what stays packed.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from swarm_notebook.checkpoint.files.gguf import GgufWeights
from swarm_notebook.checkpoint.files.weights import Weights, block_index
from swarm_notebook.checkpoint.files.words import WordWeights
from swarm_notebook.checkpoint.packed import Packed, matrices, replace
from swarm_notebook.checkpoint.parts.partial import LoadedBlocks

logger: logging.Logger = logging.getLogger(__name__)

Keepable = GgufWeights | WordWeights


def keepable(weights: Weights) -> Keepable | None:
    """The same, if its matrices can stay as they are stored."""
    return weights if isinstance(weights, (GgufWeights, WordWeights)) else None


def bytes_by_block(weights: Keepable, itemsize: int) -> dict[int, int]:
    """What blocks take so, where a number that is not packed takes ``itemsize`` bytes."""
    found: dict[int, int] = {}
    for name in weights.names():
        if (block := block_index(name)) is not None:
            found[block] = found.get(block, 0) + weights.packed_bytes(name, itemsize)
    return found


def keep_packed(weights: Keepable, one: LoadedBlocks) -> tuple[int, int]:
    """Put what is stored in the place of a block's matrices.

    Only where it unpacks to exactly what was loaded: what is put together of several tensors, or
    stored in another order than by rows, stays as it was loaded.

    Returns:
        bytes and numbers of the block's matrices.
    """
    (layer,) = one.layers
    nbytes = count = 0
    for name, module, attribute, loaded in list(matrices(layer)):
        packed = _stored(weights, f".{one.start}.{name}", loaded)
        count += loaded.numel()
        if packed is None:
            nbytes += loaded.numel() * loaded.itemsize
            logger.info("block %d: %s is not packed in memory", one.start, name)
            continue
        nbytes += packed.nbytes
        replace(module, attribute, packed, loaded.dtype)
    return nbytes, count


def _stored(weights: Keepable, ending: str, loaded: nn.Parameter) -> Packed | None:
    named = [name for name in weights.names() if name.endswith(ending)]
    if len(named) != 1:
        return None
    packed = weights.packed(named[0], loaded.shape, loaded.device)
    same = packed is not None and torch.equal(packed.unpack(loaded.dtype), loaded)
    return packed if same else None
