"""What audits have found, as a table; it shows itself as `status` does."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from swarm_notebook.client.audit import record
from swarm_notebook.client.audit.verdicts import AGREED, OPEN, WRONG, Verdict
from swarm_notebook.report.base import ModelReport
from swarm_notebook.report.formatting import data_frame, text_table
from swarm_notebook.report.html import head, number_cell, peer_cell, table, view
from swarm_notebook.texts import clean

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["when", "name", "peer_id", "blocks", "tokens", "outcome", "by", "error", "why"]
_DOTS = {AGREED: "sn-online", OPEN: "sn-joining", WRONG: "sn-bad"}


@dataclass(frozen=True)
class AuditTable(ModelReport):
    """The latest audits, the oldest first.

    Attributes:
        rate: how much is computed for audits, as a share of what is computed anyway; 0 for none.
        digest: of the notebook's checkpoint.
    """

    model: str
    rate: float
    verdicts: tuple[Verdict, ...]
    digest: str = ""

    @property
    def wrong(self) -> tuple[str, ...]:
        """The peer ids of servers whose answers were found wrong."""
        return tuple({one.peer: None for one in self.verdicts if one.outcome == WRONG})

    @property
    def headline(self) -> str:
        """One sentence: is what came back right, as far as was looked?"""
        if not self.rate:
            return "nothing is audited; connect(..., verify='spot') does"
        counts = dict.fromkeys((AGREED, WRONG, OPEN), 0)
        for verdict in self.verdicts:
            counts[verdict.outcome] += 1
        parts = [f"{counts[AGREED]} agreed"]
        parts += [f"{counts[kind]} {kind.upper()}" for kind in (WRONG, OPEN) if counts[kind]]
        return f"{len(self.verdicts)} audits, {', '.join(parts)}"

    def export(self, path: str | Path, *, states: bool = True) -> Path:
        """Write the wrong answers as a record that ``swarm-notebook check`` replays.

        It holds what the servers were asked: hidden states, from which your text can be read.

        Args:
            states: False writes hashes in their place: nobody can read your text, and nobody can
                replay the record.

        Raises:
            ValueError: no answer was found wrong.
        """
        path = Path(path)
        if not any(one.proof for one in self.verdicts):
            raise ValueError("export: no answer was found wrong, so there is nothing to prove")
        record.write(path, self.model, self.digest, self.verdicts, states=states)
        return path

    def to_pandas(self) -> pd.DataFrame:
        """The audits as a data frame, one row each."""
        rows = [
            {
                "when": datetime.fromtimestamp(one.when, UTC),
                "name": one.name,
                "peer_id": one.peer,
                "blocks": f"{one.start}:{one.end}",
                "tokens": one.tokens,
                "outcome": one.outcome,
                "by": ", ".join(one.by),
                "error": None if one.errors is None else one.errors.mean,
                "why": one.why,
            }
            for one in self.verdicts
        ]
        return data_frame(rows, _COLUMNS)

    def __repr__(self) -> str:
        return self._as_text(["server", "blocks", "tokens", "outcome", "replayed by"])

    def __str__(self) -> str:
        return self._as_text([*_words(self.verdicts[0])] if self.verdicts else [])

    def _as_text(self, titles: list[str]) -> str:
        rows = [[_words(one)[title] for title in titles] for one in self.verdicts]
        listed = text_table(titles, rows) if rows else []
        return "\n".join([f"{self.title}: {self.headline}", *listed])

    def as_html(self) -> str:
        """The headline and the audits, as one static fragment."""
        first = head(self.title, self.headline, alarm=bool(self.wrong))
        if not self.verdicts:
            return view(first)
        rows = "".join(
            f"<tr><td>{escape(one.name)}</td>{peer_cell(one.peer)}<td>{one.start}:{one.end}</td>"
            f'<td><span class="sn-dot {_DOTS[one.outcome]}"></span>{one.outcome}</td>'
            f"{number_cell(str(one.tokens))}{number_cell(_error(one))}"
            f'<td>{escape(_by(one))}</td><td class="sn-note">{escape(one.why)}</td></tr>'
            for one in self.verdicts
        )
        titles = ["server", "peer", "blocks", "outcome"]
        listed = table(titles, ["tokens", "error"], ["replayed by", "why"], rows)
        # There may be hundreds.
        return view(f'{first}<div class="sn-long" tabindex="0">{listed}</div>')


def _words(verdict: Verdict) -> dict[str, str | None]:
    """All that a table of text may have of it, by the titles of its columns."""
    return {
        "server": clean(verdict.name),
        "peer": verdict.peer,
        "blocks": f"{verdict.start}:{verdict.end}",
        "tokens": str(verdict.tokens),
        "outcome": verdict.outcome,
        "replayed by": _by(verdict),
        "error": _error(verdict),
        "why": clean(verdict.why) or None,
    }


def _by(verdict: Verdict) -> str:
    return clean(", ".join(verdict.by)) or "nobody"


def _error(verdict: Verdict) -> str:
    return "" if verdict.errors is None else f"{verdict.errors.mean:.1e}"
