"""Blocks in few bits: what rounding each matrix costs, who gets how many bits, and loading them.

The blocks are read twice, one at a time, so that they never take their whole memory. The first time
each matrix is rounded to each grid that may be worth it, and the block's output compared with its
output as it is: errors on one text choose (`allocation`), and the choice is kept only if its errors
on another text are smaller than those of one grid for all in the same budget. The second time the
matrices are packed. What was chosen is remembered in the user's cache, by the weights themselves,
so that a restart measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from swarm_notebook.checkpoint.gguf import GgufWeights
from swarm_notebook.checkpoint.gguf_packed import keep_packed
from swarm_notebook.checkpoint.packed import Grid, matrices, pack, replace
from swarm_notebook.checkpoint.partial import LoadedBlocks, load_blocks, load_one_by_one
from swarm_notebook.checkpoint.weights import block_index
from swarm_notebook.errors import Unsupported
from swarm_notebook.server.engine.quantising.allocation import Choice, allocate
from swarm_notebook.server.engine.quantising.calibration import calibration_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from swarm_notebook.checkpoint.loading import Progress
    from swarm_notebook.checkpoint.source import ModelSource

logger = logging.getLogger(__name__)

MIN_BITS, MAX_BITS = 2.5, 16.0
# From coarse to fine: 2.5, 3.5, 4.25, 4.5, 5 and 8 bits with scales and offsets.
GRIDS = (Grid(2, 64), Grid(3, 64), Grid(4, 128), Grid(4, 64), Grid(4, 32), Grid(8, 0))
# For widths that are no multiple of 32.
_NARROW = (Grid(2, 16), Grid(3, 16), Grid(4, 16), Grid(8, 0))
# So many grids around the budget are measured: further ones are hardly ever chosen.
_MEASURED_BELOW, _MEASURED_ABOVE = 2, 3


@dataclass(frozen=True)
class Quantised:
    """How blocks were packed.

    Attributes:
        bits: per weight of their matrices, with scales and offsets.
        error: of their output, relative to its size: the mean square of the difference from the
            output of the weights as they are, by the mean square of that output. None where the
            weights are as they were published.
    """

    bits: float
    error: float | None


def check_bits(bits: float) -> float:
    """The number of bits, if it is possible.

    Raises:
        Unsupported: it is not.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise Unsupported(
            f"--bits {bits:g}: possible are {MIN_BITS} to {MAX_BITS:g} bits per weight, scales "
            "included (4.5 is a good choice; 8.5 can hardly be told from 16)"
        )
    return bits


def load_within(
    source: ModelSource, start: int, end: int, *, bits: float | None, **reading: Any
) -> tuple[LoadedBlocks, Quantised | None]:
    """Load blocks as they are, at ``bits`` per weight, or packed as their GGUF file has them.

    Unpacked weights are faster: with the demo model on two busy cores, 10.3 tokens/s instead of
    7.3, and a prompt in a third of the time. So a GGUF file's stay packed only where memory is
    short, by the rule for packed copies (`products.kernels`): half of what was free is to stay
    free.

    Args:
        bits: None decides so for a GGUF file; 16 or more unpacks it whatever memory is there.
        reading: as for `load_blocks`.

    Raises: as `load_quantised`.
    """
    if bits is not None and bits < MAX_BITS:
        return load_quantised(source, start, end, bits=bits, **reading)
    weights = source.weights()
    if (
        bits is not None
        or not isinstance(weights, GgufWeights)
        or _fits(weights, start, end, **reading)
    ):
        return load_blocks(source, start, end, **reading), None
    nbytes = count = 0

    def change(one: LoadedBlocks) -> None:
        nonlocal nbytes, count
        taken, numbers = keep_packed(weights, one)
        nbytes, count = nbytes + taken, count + numbers

    loaded = load_one_by_one(source, start, end, change, **reading)
    stored = 8 * nbytes / count
    return loaded, Quantised(stored, None) if stored < MAX_BITS else None


def _fits(
    weights: GgufWeights,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    **_: Any,
) -> bool:
    """Whether half of the device's free memory stays free with these blocks unpacked."""
    index = {name: block_index(name) for name in weights.names()}
    wanted = weights.count(name for name, block in index.items() if block in range(start, end))
    return 2 * wanted * dtype.itemsize <= free_memory(device)


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

    Raises: as `load_blocks`, and Unsupported if so few bits are not possible for these matrices.
    """
    check_bits(bits)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    states = calibration_states(source, dtype).to(device)
    memory = _memory_file(source, start, end, bits)
    chosen = _remembered(memory)
    if chosen is None:
        chosen = _choose(source, start, end, bits=bits, states=states, options=options)
        _remember(memory, chosen)
    rest = iter(chosen)
    packed = unpacked = 0
    float_states, states = states, states.clone()

    def change(one: LoadedBlocks) -> None:
        nonlocal packed, unpacked, states, float_states
        (layer,) = one.layers
        importance = _importance(one, float_states)
        float_states = _run(one, float_states)
        for name, module, attribute, weight in matrices(layer):
            made = pack(weight.detach(), next(rest), importance.get(name))
            packed, unpacked = packed + made.nbytes, unpacked + weight.numel()
            replace(module, attribute, made, dtype)
        states = _run(one, states)

    loaded = load_one_by_one(source, start, end, change, progress=progress, **options)
    result = Quantised(8 * packed / unpacked, _error(states[1:], float_states[1:]))
    logger.info("packed the weights: %.2f bits each, error %.2g", result.bits, result.error)
    return loaded, result


def _choose(
    source: ModelSource,
    start: int,
    end: int,
    *,
    bits: float,
    states: torch.Tensor,
    options: dict[str, Any],
) -> list[Grid]:
    """A grid for every matrix of the blocks, in their order."""
    items: list[list[Choice]] = []
    held_out: list[list[float]] = []
    grids: list[list[Grid]] = []
    shapes: list[torch.Size] = []
    for block in range(start, end):
        one = load_blocks(source, block, block + 1, **options)
        (layer,) = one.layers
        importance = _importance(one, states)
        output = _run(one, states)
        for name, module, attribute, weight in list(matrices(layer)):
            possible = _possible(weight.shape, bits)
            if not possible:
                raise Unsupported(
                    f"--bits {bits:g}: matrices of {weight.shape[-1]} columns take "
                    f"{min(grid.cost(weight.shape) for grid in _fitting(weight.shape)):.3g} at "
                    "least"
                )
            losses = []
            for grid in possible:
                packed = pack(weight.detach(), grid, importance.get(name))
                rounded = packed.unpack(weight.dtype)
                module._parameters[attribute] = nn.Parameter(rounded, requires_grad=False)
                found = _run(one, states)
                losses.append([_error(found[row], output[row]) for row in (0, 1)])
            module._parameters[attribute] = weight
            sizes = [weight.numel() * grid.cost(weight.shape) for grid in possible]
            items.append([Choice(s, loss[0]) for s, loss in zip(sizes, losses, strict=True)])
            held_out.append([loss[1] for loss in losses])
            grids.append(possible)
            shapes.append(weight.shape)
        states = output
        logger.info("measured what bits are worth in block %d", block)
    budget = bits * sum(shape.numel() for shape in shapes)
    mixed = allocate(items, budget)
    uniform = _uniform(grids, shapes, bits)
    choice = mixed or uniform
    if choice is None:
        raise Unsupported(f"--bits {bits:g} is too little for the matrices of these blocks")
    if mixed is not None and uniform is not None:
        worth = [
            sum(losses[index] for losses, index in zip(held_out, picked, strict=True))
            for picked in (mixed, uniform)
        ]
        logger.info("errors on other text: %.3g mixed, %.3g uniform", *worth)
        choice = mixed if worth[0] < worth[1] else uniform
    return [row[index] for row, index in zip(grids, choice, strict=True)]


def _fitting(shape: torch.Size) -> list[Grid]:
    wide = [grid for grid in GRIDS if grid.fits(shape)]
    narrow = [grid for grid in _NARROW if grid.fits(shape)]
    return wide if any(grid.bits < 8 for grid in wide) else narrow or wide


def _possible(shape: torch.Size, bits: float) -> list[Grid]:
    """The grids of a matrix that are measured for a budget: some on each side of it."""
    grids = _fitting(shape)
    below = [grid for grid in grids if grid.cost(shape) <= bits]
    above = [grid for grid in grids if grid.cost(shape) > bits]
    return below[-_MEASURED_BELOW:] + above[:_MEASURED_ABOVE]


def _uniform(
    grids: Sequence[Sequence[Grid]], shapes: Sequence[torch.Size], bits: float
) -> list[int] | None:
    """The finest grid within the budget for every matrix, where there is one."""
    found = []
    for row, shape in zip(grids, shapes, strict=True):
        within = [index for index, grid in enumerate(row) if grid.cost(shape) <= bits]
        if not within:
            return None
        found.append(within[-1])
    return found


@torch.inference_mode()
def _run(one: LoadedBlocks, states: torch.Tensor) -> torch.Tensor:
    return one.model(inputs_embeds=states, use_cache=False).last_hidden_state


def _importance(one: LoadedBlocks, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean squares of what each linear layer gets for the first text, by matrix."""
    (layer,) = one.layers
    found: dict[str, torch.Tensor] = {}

    def seen(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].float().square().flatten(0, -2).mean(dim=0)

        return hook

    handles = [
        module.register_forward_pre_hook(seen(name))
        for name, module, _, _ in matrices(layer)
        if type(module) is nn.Linear
    ]
    try:
        _run(one, states[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.float()
    return float((found.float() - expected).square().mean() / expected.square().mean())


def _memory_file(source: ModelSource, start: int, end: int, bits: float) -> Path:
    """Where the choice for these weights is remembered.

    They are known by the first row of every tensor of the first block: revisions differ in them.
    """
    import platformdirs

    weights = source.weights()
    names = [name for name in weights.names() if block_index(name) == start]
    digest = hashlib.sha256(repr((source.dht_prefix, start, end, bits, GRIDS)).encode())
    for name, lazy in sorted(weights.lazy(names).items()):
        digest.update(name.encode())
        digest.update(lazy[:1].float().numpy().tobytes())
    folder = Path(platformdirs.user_cache_dir("swarm_notebook")) / "bits"
    return folder / f"{digest.hexdigest()[:32]}.json"


def _remembered(path: Path) -> list[Grid] | None:
    try:
        found = [Grid(bits, group) for bits, group in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return None
    return found if set(found) <= {*GRIDS, *_NARROW} else None


def _remember(path: Path, chosen: Sequence[Grid]) -> None:
    """Best effort: what is not remembered is measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps([(grid.bits, grid.group) for grid in chosen]))
        unfinished.replace(path)
    except OSError as error:
        logger.info("what was chosen is not remembered: %s", error)
