"""Will it run, with which blocks where, and how fast: a plan before anything is fetched.

    plan = sn.plan("org/name", machines=["laptop:16GB:60GB/s", "rtx3090"], context=4096)
    plan.fits, plan.tokens_per_second
    plan                      # a table, and machines as bars of blocks

The notebook runs on the first machine, and its embeddings and head take memory there. Rates are
those of a conversation that has filled half of its context. For one stream they are a sum, and for
several what comes of it in simulated time (`simulation`), where steps wait and share calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING

from swarm_notebook.errors import ContextTooLong, PlanError
from swarm_notebook.planning.machines import Link, Machine, machine, read_link
from swarm_notebook.planning.placement import (
    Demand,
    Share,
    edge_bytes,
    fitting_blocks,
    hop_seconds,
    place,
    prompt_seconds,
    token_parts,
)
from swarm_notebook.planning.shape import ModelShape, read_shape
from swarm_notebook.planning.simulation import rate_together
from swarm_notebook.report.base import Report
from swarm_notebook.report.formatting import data_frame, duration, number, size, text_table
from swarm_notebook.report.html import block_bar, facts, head, number_cell, table, view
from swarm_notebook.texts import clean

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedConfig

# Bits per weight that are tried, where nobody says how many: what is computed in (32 on CPUs), half
# of it, and what 8-, 4-, 3- and 2-bit weights take with their scales and zeros, and mixes of them.
LADDER = (32.0, 16.0, 8.5, 6.5, 5.5, 5.0, 4.5, 4.25, 4.0, 3.5, 3.0, 2.5)
MIN_BITS, MAX_BITS = 2.5, 16.0
# The prompt whose time to the first token is told, if the context is not shorter.
PROMPT_TOKENS = 512
# So many more machines are tried where one more is not enough.
MOST_MORE = 64
# So many streams are simulated in 3.4 s of a core of an AMD EPYC, through one server or ten.
MOST_SESSIONS = 10_000
# A network at home or in an office.
LAN = Link(round_trip=0.001, bandwidth=125e6)

_COLUMNS = ["machine", "blocks", "bits", "weights_bytes", "cache_bytes", "room_bytes", "step_ms"]


@dataclass(frozen=True)
class Plan(Report):
    """How a model would run on some machines.

    Attributes:
        shares: who holds which blocks, in their order; empty if they do not fit.
        bits: per weight, where it had to be fewer than what is computed in; else None.
        link: the network that was assumed.
        tokens_per_second: of one stream; 0 if it does not fit.
        first_token_seconds: for a prompt of ``prompt_tokens``.
        parts: seconds of a token, by where they are spent.
        missing: bytes that do not fit anywhere at ``bits``.
        one_more: what one more machine would change, a sentence.
    """

    shape: ModelShape
    machines: tuple[Machine, ...]
    demand: Demand
    link: Link
    shares: tuple[Share, ...]
    bits: float | None
    tokens_per_second: float
    first_token_seconds: float
    prompt_tokens: int
    parts: dict[str, float]
    missing: int
    one_more: str

    @property
    def fits(self) -> bool:
        return bool(self.shares)

    @cached_property
    def many_tokens_per_second(self) -> float:
        """Of ``demand.sessions`` streams together, as simulated; 0 if it does not fit."""
        if not self.fits or self.demand.sessions == 1:
            return self.tokens_per_second
        return rate_together(self.shape, self.shares, self.machines[0], self.demand, self.link)

    @property
    def cache_per_session(self) -> int:
        """Bytes of keys and values of one session, on all machines together."""
        return sum(share.cache for share in self.shares) // self.demand.sessions

    @property
    def bottleneck(self) -> str:
        """Where most of a token's time is spent; what is missing if the model does not fit."""
        if not self.fits:
            return f"memory: {size(self.missing)} too little"
        name = max(self.parts, key=self.parts.__getitem__)
        return f"{name}: {self.parts[name] / sum(self.parts.values()):.0%} of a token's time"

    @property
    def headline(self) -> str:
        """Whether it runs, and how fast, in one line."""
        if not self.fits:
            return f"does not fit: {size(self.missing)} too little"
        at = "" if self.bits is None else f" at {self.bits:g} bits per weight"
        return f"fits{at}, about {number(self.tokens_per_second)} tokens/s for one stream"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What is beside the table, as (name, text)."""
        sessions = self.demand.sessions
        positions, stored = f"{self.demand.context:,}", self.shape.stored_bits
        notebook = self.machines[0]
        found = [
            (
                "model",
                f"{number(self.shape.parameters / 1e6)} million weights in "
                f"{len(self.shape.blocks)} blocks"
                + ("" if stored is None else f", stored in {stored:.3g} bits each"),
            ),
            (
                "notebook",
                f"embeddings and head: {size(edge_bytes(self.shape, notebook))} on {notebook.name}",
            ),
        ]
        if self.fits:
            found += [
                (
                    "cache",
                    f"{size(self.cache_per_session)} per session of {positions} positions",
                ),
                ("one stream", f"{number(self.tokens_per_second)} tokens/s"),
                (f"{sessions} streams", f"{number(self.many_tokens_per_second)} tokens/s together"),
                (
                    "first token",
                    f"{duration(self.first_token_seconds)} after {self.prompt_tokens:,} tokens",
                ),
            ]
            if sessions == 1:
                found = [fact for fact in found if fact[0] != "1 streams"]
        found.append(("bottleneck", self.bottleneck))
        found.append(("one more", self.one_more))
        return found

    def commands(self, model: str = "MODEL") -> list[str]:
        """What to run on each machine that has blocks, in their order."""
        lines = []
        for share in self.shares:
            line = " ".join(["swarm-notebook serve", *([model] if model else [])])
            line += f" --blocks {share.start}:{share.end}"
            if share.bits < MAX_BITS:
                line += f" --bits {share.bits:g}"
            elif share.bits < share.machine.float_bits:
                line += " --dtype bfloat16"
            lines.append(line)
        return lines

    def to_pandas(self) -> pd.DataFrame:
        """The shares as a data frame, one row each."""
        rows = [
            (
                share.machine.name,
                f"{share.start}:{share.end}",
                share.bits,
                share.weights,
                share.cache,
                share.machine.room,
                1000 * seconds,
            )
            for share, seconds in zip(self.shares, self.parts.values(), strict=False)
        ]
        return data_frame(rows, _COLUMNS)

    def __repr__(self) -> str:
        return f"{clean(self.shape.name)}: {self.headline}"

    def __str__(self) -> str:
        titles = ["machine", "blocks", "bits", "weights", "cache", "of", "ms/token"]
        lines = text_table(titles, self._rows()) if self.fits else []
        lines += [f"  {name:<12}{clean(text)}" for name, text in self.facts]
        return "\n".join([repr(self), *lines])

    def _rows(self) -> list[list[str]]:
        return [
            [
                share.machine.name,
                f"{share.start}:{share.end}",
                f"{share.bits:g}",
                size(share.weights),
                size(share.cache),
                size(share.machine.room),
                f"{1000 * seconds:.1f}",
            ]
            for share, seconds in zip(self.shares, self.parts.values(), strict=False)
        ]

    def as_html(self) -> str:
        """Machines as bars of blocks, and the facts, as one static fragment."""
        body = head(self.shape.name, self.headline, alarm=not self.fits)
        rows = ""
        for share, cells in zip(self.shares, self._rows(), strict=True):
            bar = block_bar(share.start, share.end, len(self.shape.blocks))
            filled = block_bar(0, share.memory, max(share.machine.room, 1))
            rows += (
                f'<tr><td title="{escape(share.machine.source)}">{escape(cells[0])}</td>'
                f"<td>{bar}{cells[1]}</td><td>{filled}{escape(size(share.memory))} of "
                f"{escape(cells[5])}</td>"
                + "".join(number_cell(cells[column]) for column in (2, 3, 4, 6))
                + "</tr>"
            )
        if rows:
            numbers = ["bits", "weights", "cache", "ms/token"]
            body += table(["machine", "blocks", "memory"], numbers, [], rows)
        return view(body + facts(self.facts))


def plan(
    model: str | os.PathLike[str] | PreTrainedConfig | None = None,
    machines: Sequence[str | Machine] | None = None,
    *,
    context: int = 4096,
    sessions: int = 1,
    bits: float | None = None,
    link: str | Link = LAN,
) -> Plan:
    """Say whether and how a model would run on some machines; nothing of its weights is read.

    Args:
        model: a Hub id, a folder, a config file, a GGUF file, or a transformers config; None is
            the demo model.
        machines: each as ``NAME[:MEMORY[:BANDWIDTH]]``, such as ``"rtx3090"`` or
            ``"laptop:16GB:60GB/s"``; None measures this one. The notebook runs on the first.
        context: positions of a session.
        sessions: how many there is to be room for, and how many run at the same time.
        bits: per weight, from 2.5 to 16; None takes as many as fit.
        link: the network between all of them, as ``ROUND_TRIP[:BANDWIDTH]``, such as
            ``"50ms:100Mbit/s"``.

    Raises:
        ModelNotFound: nothing is known of the model.
        Unsupported: it is not a causal language model of blocks.
        PlanError: a machine, the link, the number of bits, or of sessions.
        ContextTooLong: the model has fewer positions.
    """
    if machines is None:
        from swarm_notebook.planning.measure import this_machine

        machines = [this_machine()]
    found = [machine(one) for one in machines]
    if not found:
        raise PlanError("machines: none are given; give some, or None for this one")
    if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(f"bits: {bits:g}, expected {MIN_BITS} to {MAX_BITS:g} bits per weight")
    for name, value in (("context", context), ("sessions", sessions)):
        if value < 1:
            raise PlanError(f"{name}: {value}, expected at least 1")
    if sessions > MOST_SESSIONS:
        raise PlanError(
            f"sessions: {sessions:,}, at most {MOST_SESSIONS:,} at a time; plan for a part of them"
        )
    shape = read_shape(model)
    if shape.context is not None and context > shape.context:
        raise ContextTooLong(f"context: {context}, but {shape.name} has {shape.context} positions")
    return plan_shape(shape, found, Demand(context, sessions), read_link(link), bits)


def machines_of(named: Sequence[str], *, measured: bool) -> list[str | Machine] | None:
    """Named machines, after this one if it is to be ``measured``; None if there are none."""
    if not measured:
        return list(named) or None
    from swarm_notebook.planning.measure import this_machine

    return [this_machine(), *named]


def plan_shape(
    shape: ModelShape,
    machines: Sequence[Machine],
    demand: Demand,
    between: Link,
    bits: float | None = None,
) -> Plan:
    """As `plan`, for a shape and machines that are known."""
    return _with_one_more(_without_one_more(shape, machines, demand, between, bits), bits)


def _without_one_more(
    shape: ModelShape,
    machines: Sequence[Machine],
    demand: Demand,
    between: Link,
    bits: float | None,
) -> Plan:
    notebook = machines[0]
    taken = [edge_bytes(shape, notebook)] + [0] * (len(machines) - 1)
    prompt = min(PROMPT_TOKENS, demand.context)
    parts: dict[str, float] = {}
    first = missing = 0.0
    for wanted in LADDER if bits is None else (bits,):
        each = [min(wanted, one.float_bits) for one in machines]
        shares = place(shape, machines, demand, between, bits=each, taken=taken)
        if shares is not None:
            break
    else:
        held = fitting_blocks(shape, machines, demand, each, taken)
        rest = shape.blocks[held:]
        positions = demand.context * demand.sessions
        missing = sum(
            b.matrices * wanted / 8 + b.vectors * 2 + positions * b.cache * 2 for b in rest
        )
    if shares is not None:
        parts = token_parts(shape, shares, notebook, demand, between)
        first = parts["the notebook"] + sum(
            prompt_seconds(shape, share, prompt) + hop_seconds(shape, between, prompt)
            for share in shares
        )
    whole = shares and all(share.bits == share.machine.float_bits for share in shares)
    return Plan(
        shape,
        tuple(machines),
        demand,
        between,
        tuple(shares or ()),
        None if whole else wanted,
        1 / sum(parts.values()) if parts else 0.0,
        first,
        prompt,
        parts,
        int(missing),
        "",
    )


def _with_one_more(best: Plan, bits: float | None) -> Plan:
    """The same plan, and what one more of its machines would change."""

    def planned(more: Sequence[Machine]) -> Plan:
        machines = [*best.machines, *more]
        return _without_one_more(best.shape, machines, best.demand, best.link, bits)

    kinds = list({one.name: one for one in best.machines}.values())
    tried = [(one, planned([one])) for one in kinds]
    one, other = max(
        tried, key=lambda pair: (pair[1].fits, pair[1].bits or 99, pair[1].tokens_per_second)
    )
    if best.fits:
        bits_then = "" if other.bits == best.bits else f"{_bits(other)} instead of {_bits(best)}, "
        text = (
            f"another {one.name}: {bits_then}{number(other.tokens_per_second)} tokens/s instead of "
            f"{number(best.tokens_per_second)}"
        )
        if not bits_then and other.tokens_per_second < 1.02 * best.tokens_per_second:
            text = f"another {one.name} would change nothing for one stream"
    elif other.fits:
        text = f"with another {one.name} it {other.headline}"
    else:
        largest = max(kinds, key=lambda kind: kind.room)
        counts = range(2, MOST_MORE + 1)
        enough = next((n for n in counts if planned([largest] * n).fits), None)
        text = (
            f"it takes {enough} more {largest.name}"
            if enough is not None
            else f"{MOST_MORE} more {largest.name} are not enough"
        )
    return replace(best, one_more=text)


def _bits(found: Plan) -> str:
    return "whole weights" if found.bits is None else f"{found.bits:g} bits"
