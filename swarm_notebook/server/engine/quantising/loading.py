"""Blocks in few bits: loading them, at a choice that is measured once.

The blocks are read twice, one at a time, so that they never take their whole memory: first to find
the grid of every matrix (`measuring`), then to pack them. What was chosen is remembered in the
user's cache, by the weights themselves, so that a restart measures nothing.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from swarm_notebook.checkpoint.as_stored import Keepable, keep_packed, keepable
from swarm_notebook.checkpoint.files.quantised import method_of
from swarm_notebook.checkpoint.files.weights import block_index
from swarm_notebook.checkpoint.packed import (
    AS_PUBLISHED,
    Grid,
    matrices,
    pack,
    packing_of,
    replace,
)
from swarm_notebook.checkpoint.parts.partial import (
    LoadedBlocks,
    bare_layers,
    load_blocks,
    load_one_by_one,
)
from swarm_notebook.errors import Unsupported
from swarm_notebook.server.engine.quantising.calibration import calibration_states
from swarm_notebook.server.engine.quantising.measuring import (
    GRIDS,
    NARROW,
    around,
    importance,
    measure,
    output_error,
    run,
)
from swarm_notebook.server.engine.quantising.memory import Memory

if TYPE_CHECKING:
    from swarm_notebook.checkpoint.files.source import ModelSource
    from swarm_notebook.checkpoint.parts.loading import Progress

logger: logging.Logger = logging.getLogger(__name__)

MIN_BITS, MAX_BITS = 2.5, 16.0


@dataclass(frozen=True)
class Quantised:
    """How blocks were packed.

    Attributes:
        bits: per weight of their matrices, with scales and offsets.
        error: of their output, relative to its size: the mean square of the difference from the
            output of the weights as they are, by the mean square of that output. None where the
            weights are as they were published.
        perplexity: by how much the whole model's grows at these bits, as `loss` measured it; None
            if nobody asked.
        packing: `PACKING_BYTES` for each block, that tell the values of its weights from others:
            `AS_PUBLISHED`, or `packing_of` the block; None if nobody here knows the values.
    """

    bits: float
    error: float | None
    perplexity: float | None = None
    packing: bytes | None = None


def check_bits(bits: float) -> float:
    """The number of bits, if it is possible.

    Raises:
        Unsupported: it is not.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise Unsupported(
            f"--bits {bits:g}: expected {MIN_BITS} to {MAX_BITS:g} bits per weight, scales "
            "included (4.5 is a good choice; 8.5 can hardly be told from 16)"
        )
    return bits


def load_within(
    source: ModelSource,
    start: int,
    end: int,
    *,
    bits: float | None,
    memory: int | None = None,
    **reading: Any,
) -> tuple[LoadedBlocks, Quantised | None]:
    """Load blocks as they are, at ``bits`` per weight, or packed as their file has them.

    Unpacked weights are faster: with the demo model on two busy cores, 10.3 tokens/s instead of
    7.3, and a prompt in a third of the time. So those of a GGUF file, of GPTQ or AWQ stay packed
    only where memory is short, by the rule for packed copies (`products.kernels`): half of what was
    free is to stay free.

    Args:
        bits: None decides so for such files; 16 or more unpacks them whatever memory is there.
        reading: as for `load_blocks`.

    Raises: as `load_quantised`.
    """
    by = method_of(source.config())
    if bits is not None and bits < MAX_BITS:
        if by is not None:
            raise Unsupported(
                f"the weights of {source.name} are quantised already, by {by}: serve them as they "
                "are, without --bits"
            )
        return load_quantised(source, start, end, bits=bits, **reading)
    weights = keepable(source.weights())
    if bits is not None or weights is None or _fits(weights, start, end, memory=memory, **reading):
        told = None if source.quantised_by is None else _published(source, start, end)
        return load_blocks(source, start, end, **reading), told
    nbytes = count = 0

    def change(one: LoadedBlocks) -> None:
        nonlocal nbytes, count
        taken, numbers = keep_packed(weights, one)
        nbytes, count = nbytes + taken, count + numbers

    loaded = load_one_by_one(source, start, end, change, **reading)
    stored = 8 * nbytes / count
    published = AS_PUBLISHED * (end - start)
    return loaded, Quantised(stored, None, packing=published) if stored < MAX_BITS else None


def _published(source: ModelSource, start: int, end: int) -> Quantised | None:
    """In how many bits the weights of some blocks are stored, who are loaded as they are."""
    layers, weights = bare_layers(source)[start:end], source.weights()
    count = sum(one.numel() for layer in layers for one in layer.parameters())
    names = [name for name in weights.names() if block_index(name) in range(start, end)]
    stored = 8 * sum(lazy.nbytes for lazy in weights.lazy(names).values()) / count
    known = None if keepable(weights) is None else AS_PUBLISHED * (end - start)
    return Quantised(stored, None, packing=known) if stored < MAX_BITS else None


def _fits(
    weights: Keepable,
    start: int,
    end: int,
    *,
    memory: int | None,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    **_: Any,
) -> bool:
    """Whether these blocks, unpacked, take what they may, or half of the device's free memory."""
    index = {name: block_index(name) for name in weights.names()}
    wanted = weights.count(name for name, block in index.items() if block in range(start, end))
    return wanted * dtype.itemsize <= (free_memory(device) / 2 if memory is None else memory)


def free_memory(device: str | torch.device) -> int:
    """Bytes that are free on a device."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def load_quantised(
    source: ModelSource,
    start: int,
    end: int,
    *,
    bits: float,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[LoadedBlocks, Quantised]:
    """Load blocks start..end-1 with their matrices at ``bits`` per weight, on average at most.

    How much each column matters is computed in float32, whatever the dtype: so servers on other
    processors pack the same values to the same bits, and can replay each other's answers.

    Raises: as `load_blocks`, and Unsupported if so few bits are not possible for these matrices.
    """
    check_bits(bits)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    exact_states = calibration_states(source, torch.float32).to(device)
    states = exact_states.to(dtype)
    memory = Memory.of_blocks(source, start, end, (bits, GRIDS))
    chosen = _grids(memory.read())
    if chosen is None:
        losses = measure(source, start, end, states=states, grids=around(bits), **options)
        found = losses.choose(bits)
        if found is None:
            raise Unsupported(f"--bits {bits:g} is too little for the matrices of these blocks")
        chosen, _ = found
        memory.write([(grid.bits, grid.group) for grid in chosen])
    rest = iter(chosen)
    packed = unpacked = 0
    packing = bytearray()

    def change(one: LoadedBlocks) -> None:
        nonlocal packed, unpacked, states, exact_states
        (layer,) = one.layers
        exact = one if dtype == torch.float32 else copy.deepcopy(one)
        exact.model.float()
        weights = importance(exact, exact_states)
        exact_states = run(exact, exact_states)
        del exact
        for name, module, attribute, weight in matrices(layer):
            made = pack(weight.detach(), next(rest), weights.get(name))
            packed, unpacked = packed + made.nbytes, unpacked + weight.numel()
            replace(module, attribute, made, dtype)
        packing.extend(packing_of(layer))
        states = run(one, states)

    loaded = load_one_by_one(source, start, end, change, progress=progress, **options)
    ratio = Memory.of_loss(source, bits).read()
    result = Quantised(
        8 * packed / unpacked,
        output_error(states[1:], exact_states[1:]),
        ratio if isinstance(ratio, float) and ratio > 0 else None,
        bytes(packing),
    )
    logger.info("packed the weights: %.2f bits each, error %.2g", result.bits, result.error)
    return loaded, result


def _grids(told: Any) -> list[Grid] | None:
    """A choice that was remembered, if it is one."""
    try:
        found = [Grid(bits, group) for bits, group in told]
    except (ValueError, TypeError):
        return None
    return found if set(found) <= {*GRIDS, *NARROW} else None
