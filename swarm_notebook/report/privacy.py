"""What servers can read of a text: shares of its tokens by block boundary, and what they get."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from swarm_notebook.report.base import ModelReport
from swarm_notebook.report.formatting import count, data_frame, text_table
from swarm_notebook.report.html import head, number_cell, table, view
from swarm_notebook.report.plot import Line, LineChart
from swarm_notebook.texts import HERE, clean

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["boundary", "seen_by", "nearest", "inverted", "tested", "text"]


@dataclass(frozen=True)
class Boundary:
    """The states between two blocks.

    Attributes:
        after: how many blocks they have been through; 0 is the embeddings.
        seen_by: the servers that receive or give them, by name; none if they stay here.
        nearest: the share of tokens that are the nearest entry of the vocabulary.
        inverted: the share that greedy inversion recovers; None where it was not tried.
        tested: guesses that it computed.
        text: what was recovered, by inversion where it was tried.
    """

    after: int
    seen_by: tuple[str, ...]
    nearest: float
    inverted: float | None
    tested: int
    text: str

    @property
    def share(self) -> float:
        """The share of tokens that the better of both attacks recovers."""
        return max(self.nearest, self.inverted or 0.0)


@dataclass(frozen=True)
class Privacy(ModelReport):
    """What can be read at each block boundary of the present route.

    Attributes:
        text: the part of the text that was attacked.
        tokens: of it.
        boundaries: in order, from the embeddings on.
        home: the blocks that run in the notebook.
    """

    model: str
    text: str
    tokens: int
    boundaries: tuple[Boundary, ...]
    home: tuple[int, ...] = ()

    @property
    def readable(self) -> float:
        """The largest share of tokens that a server on the route recovers."""
        return max((one.share for one in self.boundaries if one.seen_by), default=0.0)

    @property
    def headline(self) -> str:
        """One sentence: what servers can read."""
        if not any(one.seen_by for one in self.boundaries):
            return "no server sees anything: all blocks are at home"
        best = max((one for one in self.boundaries if one.seen_by), key=lambda one: one.share)
        return (
            f"servers can read {best.share:.0%} of {count(self.tokens, 'token')}, "
            f"from the states {_place(best)}"
        )

    @property
    def advice(self) -> str:
        """What blocks at home change, and what they do not."""
        if not self.home:
            return (
                "The weights are public, so whoever holds the states can compute the text. Use "
                "servers that you trust with it."
            )
        seen = [one for one in self.boundaries if one.seen_by]
        if not seen:
            return ""
        change = (
            f"With blocks {', '.join(map(str, self.home))} at home, the first states that a server "
            f"sees are those {_place(seen[0])}. It can read {seen[0].share:.0%} of them"
        )
        if seen[0].inverted is not None:
            change += f", with {seen[0].tested:,} guesses"
        return (
            f"{change}. Blocks at home make that more work but hide nothing, as long as the "
            "weights are public."
        )

    @property
    def chart(self) -> LineChart:
        """The shares over the boundaries."""
        tried = [one for one in self.boundaries if one.inverted is not None]
        lines = [
            Line(
                "nearest vocabulary entry",
                [one.after for one in self.boundaries],
                [100 * one.nearest for one in self.boundaries],
            ),
            Line(
                "greedy inversion",
                [one.after for one in tried],
                [100 * (one.inverted or 0.0) for one in tried],
            ),
        ]
        return LineChart("Tokens recovered, in percent", "blocks passed", lines)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each boundary."""
        rows = [
            (one.after, ", ".join(one.seen_by), one.nearest, one.inverted, one.tested, one.text)
            for one in self.boundaries
        ]
        return data_frame(rows, _COLUMNS)

    def __repr__(self) -> str:
        return self._as_text([one for one in self.boundaries if _attacked(one)])

    def __str__(self) -> str:
        return self._as_text(self.boundaries)

    def _as_text(self, shown: Any) -> str:
        titles = ["states", "seen by", "nearest", "inversion", "recovered text"]
        rows = [
            [
                _place(one),
                ", ".join(one.seen_by) or HERE,
                f"{one.nearest:.0%}",
                None if one.inverted is None else f"{one.inverted:.0%}",
                repr(one.text),
            ]
            for one in shown
        ]
        lines = [f"{self.title}: {self.headline}", *text_table(titles, rows), self.advice]
        return "\n".join(line for line in lines if line)

    def as_html(self) -> str:
        """The headline, the curve and the table, as one static fragment."""
        first = head(self.title, self.headline, alarm=self.readable > 0)
        rows = "".join(
            f"<tr><td>{_place(one)}</td>"
            f"<td>{escape(clean(', '.join(one.seen_by) or HERE))}</td>"
            f"{number_cell(f'{one.nearest:.0%}')}"
            f"{number_cell('' if one.inverted is None else f'{one.inverted:.0%}')}"
            f'<td class="sn-note" dir="auto">{escape(one.text)}</td></tr>'
            for one in self.boundaries
            if _attacked(one)
        )
        titles = ["states", "seen by"]
        listed = table(titles, ["nearest entry", "inversion"], ["recovered text"], rows)
        said = f"<p>{escape(self.advice)}</p>" if self.advice else ""
        return view(first + said + self.chart._repr_html_() + listed)


def _attacked(boundary: Boundary) -> bool:
    return not boundary.after or boundary.inverted is not None


def _place(boundary: Boundary) -> str:
    return f"after block {boundary.after - 1}" if boundary.after else "before block 0"
