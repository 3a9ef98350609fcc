"""How many blocks a server's memory holds, and at how many bits per weight.

As they are, if all that are wanted fit so. Else as many as possible at bits that are good enough
(those asked for, or what `least_bits` measures), and then the most bits at which that many fit.
Blocks that are not to be packed anew stay as their file has them, where it is one of GGUF, GPTQ or
AWQ; what those take that transformers' quantizers read is found out with one of them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from swarm_notebook.checkpoint.as_stored import bytes_by_block, keepable
from swarm_notebook.checkpoint.files.quantised import method_of
from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.checkpoint.files.weights import block_index
from swarm_notebook.checkpoint.packed import matrices
from swarm_notebook.checkpoint.parts.partial import bare_layers, load_blocks
from swarm_notebook.errors import Unsupported
from swarm_notebook.net.wire import tensors
from swarm_notebook.server.engine.quantising.loading import MAX_BITS, free_memory
from swarm_notebook.server.engine.quantising.quality import LEVELS, least_bits
from swarm_notebook.server.options import ServeOptions

logger: logging.Logger = logging.getLogger(__name__)

# Of the free memory, for weights; the rest is for keys and values, activations and the system.
FREE_PART = 0.7


@dataclass(frozen=True)
class BlockSize:
    """How many numbers a block has.

    Attributes:
        matrices: those that can be packed.
        others: norms, biases and the like.
    """

    matrices: int
    others: int

    def nbytes(self, bits: float, width: float) -> float:
        """What it takes.

        Args:
            bits: per weight of its matrices.
            width: bits of all other numbers.
        """
        return (self.matrices * bits + self.others * width) / 8


@dataclass(frozen=True)
class Room:
    """What fits.

    Attributes:
        bits: per weight of their matrices; None: as they are.
        dtype: what is computed in.
    """

    blocks: int
    bits: float | None
    dtype: str


def room_for(source: ModelSource, options: ServeOptions) -> Room:
    """What fits into the memory that a server may use.

    Args:
        options: with a device; with blocks only if ``memory`` is given.

    Raises:
        Unsupported: not even one block does, or not all that were asked for.
    """
    sizes = _sizes(source)
    first, end = options.blocks or (0, len(sizes))
    dtype = options.computes_in(source, packed=options.bits is not None)
    width, count = _width(dtype), end - first
    largest = max(sizes[first:end], key=lambda size: size.nbytes(width, width))
    wanted = range(1 if options.blocks is None else count, count + 1)
    bits, memory = options.bits, options.memory
    if memory is None:
        memory = int(FREE_PART * free_memory(options.device))
    if method_of(source.config()) is not None:
        index = sizes.index(largest)
        return Room(
            _count(source, memory, _resident(source, index, dtype, options.device), wanted),
            bits,
            dtype,
        )
    weights = keepable(source.weights()) if bits is None else None
    if weights is not None and memory < count * largest.nbytes(width, width):
        stored = bytes_by_block(weights, width // 8)
        taken = float(max(stored.get(block, 0) for block in range(first, end)))
        dtype = options.computes_in(source, packed=True)
        return Room(_count(source, memory, taken, wanted), None, dtype)
    kept = bits is not None and bits >= MAX_BITS
    if kept or options.memory is None:
        taken = largest.nbytes(width if bits is None or kept else bits, width)
        return Room(_count(source, memory, taken, wanted), bits, dtype)
    if memory >= count * largest.nbytes(width, width):
        return Room(count, None, dtype)
    dtype = options.computes_in(source, packed=True)
    width = _width(dtype)
    if bits is None:
        bits = least_bits(source, dtype=tensors.dtype_from_name(dtype), device=options.device)
    count = _count(source, memory, largest.nbytes(bits, width), wanted, bits=bits)
    most = max(bits, most_bits(largest, memory / count, width))
    logger.info(
        "%d MiB hold %d blocks at %.3g bits per weight, as they must have, and at %.4g at most",
        memory >> 20,
        count,
        bits,
        most,
    )
    return Room(count, None if most >= width else min(most, LEVELS[-1]), dtype)


def most_bits(block: BlockSize, memory: float, width: float) -> float:
    """The bits per weight at which a block takes so many bytes, in hundredths.

    Args:
        width: bits of what is not packed.
    """
    return math.floor(100 * (8 * memory - block.others * width) / block.matrices) / 100


def _count(
    source: ModelSource, memory: int, taken: float, wanted: range, *, bits: float | None = None
) -> int:
    """How many blocks fit, if each takes so many bytes.

    Args:
        wanted: numbers of blocks that may be.
    """
    count = min(int(memory // taken), wanted[-1])
    if count in wanted:
        return count
    at = "" if bits is None else f" at {bits:.3g} bits per weight"
    raise Unsupported(
        f"{memory >> 20} MiB of memory hold {count} of {wanted[0]} blocks of {source.name}, the "
        f"largest of which takes {taken / 2**20:.3g} MiB{at}; give more --memory, fewer --blocks "
        "or fewer --bits"
    )


def _sizes(source: ModelSource) -> list[BlockSize]:
    """Of all blocks, from the config alone."""
    found = []
    for layer in bare_layers(source):
        packable = sum(weight.numel() for _, _, _, weight in matrices(layer))
        found.append(BlockSize(packable, sum(one.numel() for one in layer.parameters()) - packable))
    return found


def _resident(source: ModelSource, block: int, dtype: str, device: str) -> int:
    """Bytes of a block whose weights a quantizer of transformers has read."""
    computes_in = tensors.dtype_from_name(dtype)
    loaded = load_blocks(source, block, block + 1, dtype=computes_in, device=device)
    (layer,) = loaded.layers
    held = sum(one.nbytes for one in (*layer.parameters(), *layer.buffers()))
    weights = source.weights()
    lazy = weights.lazy(name for name in weights.names() if block_index(name) == block)
    # Some keep their scales beside the modules' parameters; they are in the file, too.
    return max(held, sum(one.nbytes for one in lazy.values()))


def _width(dtype: str) -> int:
    return 8 * tensors.dtype_from_name(dtype).itemsize
