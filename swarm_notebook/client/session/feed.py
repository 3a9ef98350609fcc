"""What goes into the blocks of a session, and the requests by which servers get it.

Servers' caches are a function of three things that are kept here: the history of what went in, the
row selections (beam search, batch changes) between its passes, and what the blocks run with besides
their own weights.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.request import Request
from swarm_notebook.client.session.history import History, Pass


class Feed:
    """The input of a session.

    Attributes:
        history: all passes, the current one included.
        adapter, prompts: what the blocks run with in the current pass.
        rows: the latest selection of rows, for servers that have not followed it yet.
        rows_version: how many selections there were.
    """

    def __init__(self) -> None:
        self.history = History()
        self.adapter: Adapter | None = None
        self.prompts: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.rows_version = 0

    def select(self, rows: torch.Tensor) -> None:
        """From the next step on, continue these rows."""
        if self.history:
            self.history.select(rows)
            self.rows_version += 1
            self.rows = rows

    def request(
        self,
        start: int,
        end: int,
        part: Pass,
        states: Collection[int] = (),
        inner: Collection[tuple[int, str]] = (),
        *,
        later: bool = False,
    ) -> Request:
        """What the server of blocks ``[start, end)`` is asked for some tokens of a pass.

        Args:
            later: the hidden states come later, from the blocks before; now only their shape is
                right.
        """
        hidden = part.input_of(start)
        if hidden is None:
            if not later:
                raise LookupError(f"the history has no input of block {start}")
            hidden = next(iter(part.edits.values()))
        return Request(
            start,
            end,
            hidden,
            part.position,
            mask=part.mask,
            position_ids=part.position_ids,
            states=[index for index in states if start <= index < end - 1],
            inner=[named for named in inner if start <= named[0] < end],
            prompts=self._prompts(start, end, part),
            adapter=self.adapter,
            rows_version=self.rows_version,
        )

    def _prompts(self, start: int, end: int, part: Pass) -> torch.Tensor | None:
        """Deep prompts of these blocks, if the pass reaches into their positions."""
        prompts = self.prompts
        if prompts is None or part.position >= prompts.shape[2]:
            return None
        return prompts[start:end]
