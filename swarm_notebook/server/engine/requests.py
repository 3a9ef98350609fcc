"""What a server is asked to compute: a forward or a backward pass, or a step of a session.

Whoever makes one of these has checked it (`rpc.parse`); what depends on the state of a session (how
many rows and positions its cache has) is checked in `steps.session_state`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


class StepTimes:
    """Where the time of a step goes inside of a server, told to the client along with the answer.

    Three parts: taking the request apart and putting the answer together, waiting for the torch
    thread, computing. The torch thread adds what it computes; the rest of the time between is
    waiting.
    """

    __slots__ = ("_arrived", "_computed", "_parsed", "compute")

    def __init__(self) -> None:
        self._arrived = self._parsed = self._computed = time.perf_counter()
        self.compute: float = 0.0

    def parsed(self) -> None:
        self._parsed = time.perf_counter()

    def computed(self) -> None:
        self._computed = time.perf_counter()

    def parts(self) -> list[float]:
        """Seconds of serialisation, queue and compute, when the answer is packed."""
        serialisation = self._parsed - self._arrived + time.perf_counter() - self._computed
        queue = max(0.0, self._computed - self._parsed - self.compute)
        return [serialisation, queue, self.compute]


@dataclass(frozen=True)
class Limits:
    """What this server hosts, against which requests are checked.

    Attributes:
        context: the number of positions that the model has, or None if it has no limit.
        tokens: the most tokens (rows x positions) of one request without a cache.
    """

    prefix: str
    start: int
    end: int
    hidden_size: int
    context: int | None
    tokens: int


@dataclass(slots=True)
class Forward:
    """Hidden states to run through ``blocks``, without a cache or as a step of a session.

    Attributes:
        states: blocks whose outputs (in a backward: gradients) are wanted as well.
        inner: modules inside of blocks whose outputs are wanted as well.
        adapter: id and version of the peer's adapter to run the blocks with.
        seed: of the dropout in the adapter; None for none.
        inner_bytes: how many bytes the outputs of ``inner`` may have; None for as many as any may.
        by_row: what PEFT tells the adapter's layers for this call, one value for each row.
        keep: the id under which to keep the activations for a backward.
        rotary_length: see `Span.compute`.
        dtype: to compute in, if not in the server's own (`cast`); without gradients.
    """

    blocks: tuple[int, int]
    hidden: torch.Tensor
    prompts: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    states: tuple[int, ...] = ()
    inner: tuple[tuple[int, str], ...] = ()
    adapter: tuple[str, int] | None = None
    seed: int | None = None
    by_row: dict[str, list[Any]] | None = None
    keep: str | None = None
    rotary_length: int | None = None
    inner_bytes: int | None = None
    dtype: torch.dtype | None = None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def length(self) -> int:
        return self.hidden.shape[1]

    def turning_length(self, position: int = 0) -> int:
        """What each piece of the request gets as ``rotary_length``: told, or that of the whole.

        Args:
            position: where the request begins in its session.
        """
        if self.rotary_length is not None:
            return self.rotary_length
        ids = self.position_ids
        if ids is None or not ids.numel():
            return position + self.length
        return max(int(ids.max()) + 1, 1)

    def extras(self) -> dict[str, Any]:
        """What `Span.compute` is told only if it is asked for."""
        extras = self.extras_of_all_blocks()
        if self.inner:
            extras.update(inner=self.inner, inner_bytes=self.inner_bytes)
        return extras

    def extras_of_all_blocks(self) -> dict[str, Any]:
        """`extras` that hold for any part of the blocks alike."""
        extras: dict[str, Any] = {}
        if self.rotary_length is not None:
            extras["rotary_length"] = self.rotary_length
        if self.seed is not None:
            extras["seed"] = self.seed
        return extras if self.by_row is None else {**extras, "by_row": self.by_row}


@dataclass(slots=True)
class Step(Forward):
    """One step of a session.

    Attributes:
        position: how many positions precede the new ones; None: all that the cache holds.
        row_ids: the cache's rows to go on with, None for all as they are.
        times: where its time goes.
        last: how many of the last positions of the last block's output the client wants; None for
            all.
        pushed: whether another server gets the last block's output, all of it.
    """

    position: int | None = None
    row_ids: list[int] | None = None
    last: int | None = None
    pushed: bool = False
    times: StepTimes = field(default_factory=StepTimes)

    @property
    def unwanted(self) -> int:
        """How many of the first positions of the last block's output nobody gets."""
        return 0 if self.last is None or self.pushed else max(self.length - self.last, 0)

    def mixes(self, position: int) -> bool:
        """Whether nothing in it concerns the whole call in which it is computed, from there on."""
        prompted = self.prompts is not None and position < self.prompts.shape[2]
        return not prompted and not self.inner and self.seed is None and self.by_row is None


@dataclass(slots=True)
class Backward(Forward):
    """A backward pass through ``blocks`` for the inputs ``hidden``.

    Attributes:
        grad: the gradient of the last block's output.
        kept: the id of a forward pass whose activations may still be there.
        release: nobody needs them after this.
    """

    grad: torch.Tensor = field(kw_only=True)
    kept: str | None = None
    release: bool = False
