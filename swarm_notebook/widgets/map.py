"""The swarm map: servers as rows, blocks as columns, alive while a notebook works.

    SwarmMap(swarm)                    # or %swarm map

A thread of the map reads what the notebook knows anyway and sends the views what has changed: it
asks the network nothing and keeps up while a cell is running.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import traitlets

from swarm_notebook import status_html
from swarm_notebook.widgets.base import Widget, action
from swarm_notebook.widgets.live import start_pulse

if TYPE_CHECKING:
    from swarm_notebook.status import ServerRow, SwarmStatus
    from swarm_notebook.swarm import Swarm

PERIOD = 0.25


class SwarmMap(Widget, module="map"):
    """Who serves which blocks, live.

    Args:
        swarm: what `connect` returned.

    Attributes:
        title: the model's name.
        num_blocks: how many blocks it has.
        headline: one sentence on whether it is whole.
        missing: the blocks that nobody serves.
        servers: the facts on each server and its blocks, see `compact`.
        clock: when that was known, in seconds of Unix time.
        selected: the peer id of the row that a user has chosen, or empty.
    """

    title = traitlets.Unicode().tag(sync=True)
    num_blocks = traitlets.Int().tag(sync=True)
    headline = traitlets.Unicode().tag(sync=True)
    missing = traitlets.List(traitlets.Int()).tag(sync=True)
    servers: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    clock = traitlets.Float().tag(sync=True)
    selected = traitlets.Unicode().tag(sync=True)

    def __init__(self, swarm: Swarm, **options: Any) -> None:
        self._swarm = swarm
        status = swarm.status(refresh=False)
        super().__init__(title=status.title, num_blocks=status.num_blocks, **options)
        self._take(status)
        start_pulse(self._beat, PERIOD)

    def summary(self) -> str:
        """The model and whether it is whole."""
        return f"{self.title}, {self.headline}"

    def picture(self) -> str:
        """The table of `Swarm.status`."""
        return status_html.status(self._status)

    @action
    def refresh(self) -> None:
        """Ask the swarm now, instead of within seconds."""
        self._take(self._swarm.status())

    def _beat(self) -> bool:
        self._take(self._swarm.status(refresh=False))
        return self._swarm.connected

    def _take(self, status: SwarmStatus) -> None:
        self._status = status
        self.update(
            headline=status.headline,
            missing=status.missing,
            servers=[compact(row) for row in status.servers],
            clock=float(int(time.time())),
        )


def compact(row: ServerRow) -> list[Any]:
    """A server as a list, which is a third of the same as a dict; `js/src/map.js` reads it."""
    return [
        row.peer_id,
        row.name,
        row.start,
        row.end,
        row.state,
        row.note,
        row.rtt,
        row.throughput,
        row.precision,
        row.cache_left,
        row.cache_total,
        row.version,
    ]
