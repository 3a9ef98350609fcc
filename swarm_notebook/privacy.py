"""Finds out by trying what the servers of a route can read of a text; `Swarm.privacy` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from swarm_notebook.checkpoint.files.source import ModelSource
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.errors import Unsupported
from swarm_notebook.model import inversion
from swarm_notebook.net.wire.tensors import float_dtype
from swarm_notebook.report.privacy import Boundary, Privacy
from swarm_notebook.writing.prompts import ids_of

# Where greedy inversion is tried unless it is said: deeper costs more and shows the same.
_DEFAULT = (1, 2, 4)
# The coarsest first: what rounds most decides when a guess fits.
_HALVES = (torch.bfloat16, torch.float16)


def examine(
    model: Any,
    source: ModelSource,
    tokenizer: Any,
    directory: Directory,
    text: str | Sequence[int],
    *,
    tokens: int,
    boundaries: Sequence[int] | None,
    candidates: int,
) -> Privacy:
    """See `Swarm.privacy`."""
    blocks = len(model._runner.blocks)
    if tokens < 1 or candidates < 1:
        raise ValueError(f"tokens: {tokens}, candidates: {candidates}; give at least 1 of each")
    wrong = [one for one in boundaries or () if not 1 <= one <= blocks]
    if wrong:
        raise ValueError(f"boundaries: {wrong[0]}; give 1 to {blocks}: so many blocks before it")
    _refuse_what_weights_do_not_know(model)
    ids = ids_of(text, tokenizer, source.name)[:tokens]
    route = directory.route()
    seen = [_seen_by(route, boundary) for boundary in range(blocks + 1)]
    if boundaries is None:
        first = next((one for one in range(1, blocks + 1) if seen[one]), 1)
        boundaries = [one for one in (*_DEFAULT, first) if one <= blocks]
    observed = inversion.observe(model, ids)
    inverted = inversion.invert(
        model,
        source,
        observed,
        sorted(set(boundaries)),
        candidates=candidates,
        dtype=_coarsest(route, model.dtype),
    )
    found = []
    for boundary, state in enumerate(observed.states):
        nearest = inversion.nearest_entries(model, state).tolist()
        best, tested = inverted.get(boundary, (nearest, 0))
        found.append(
            Boundary(
                boundary,
                seen[boundary],
                _share(nearest, ids),
                _share(best, ids) if boundary in inverted else None,
                tested,
                _text(tokenizer, best),
            )
        )
    said, home = _text(tokenizer, ids.tolist()), tuple(sorted(directory.home))
    return Privacy(source.name, said, len(ids), tuple(found), home)


def _refuse_what_weights_do_not_know(model: Any) -> None:
    runner = model._runner
    if runner.deep_prompts is not None:
        raise Unsupported(
            "deep prompts are active, which the attack does not know: remove() them first"
        )
    if runner.adapters.current(runner.blocks, thorough=True) is not None:
        raise Unsupported(
            "an adapter is active, which the attack does not know: call it within "
            "model.disable_adapter()"
        )


def _seen_by(route: Sequence[RouteSegment], boundary: int) -> tuple[str, ...]:
    return tuple(part.span.name for part in route if part.start <= boundary <= part.end)


def _coarsest(route: Sequence[RouteSegment], own: torch.dtype) -> torch.dtype:
    used = {float_dtype(part.span.info.torch_dtype) for part in route} | {own}
    return next((half for half in _HALVES if half in used), torch.float32)


def _share(guesses: Sequence[int], ids: torch.Tensor) -> float:
    return sum(map(int.__eq__, guesses, ids.tolist())) / len(ids)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(list(ids)) if tokenizer is None else str(tokenizer.decode(list(ids)))
