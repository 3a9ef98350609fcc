"""The swarm map: servers as rows, blocks as columns, alive while a notebook works.

    SwarmMap(swarm)                    # or %swarm map

A thread of the map reads what the notebook knows anyway (the directory, the events of passing
tokens, the ledger of what each server got) and sends the views what has changed. It asks the
network nothing, costs a token nothing, and keeps up while a cell is running.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import traitlets

from swarm_notebook.client.servers.routing import block_slices
from swarm_notebook.client.telemetry import Failover
from swarm_notebook.errors import MissingBlocks
from swarm_notebook.widgets.parts.base import Widget, action
from swarm_notebook.widgets.parts.pulse import start_pulse
from swarm_notebook.widgets.parts.traits import Flag, Real, String, Whole
from swarm_notebook.widgets.traffic import NotebookTraffic

if TYPE_CHECKING:
    from swarm_notebook.report.cost import ServerBill
    from swarm_notebook.report.status import ServerRow, SwarmStatus
    from swarm_notebook.swarm import Swarm

PERIOD = 0.25  # of what moves: tokens and failovers
FACTS_PERIOD = 1.0  # of what is read: servers, the bill, who has seen what
AGE_SECONDS = 5  # ages are told in steps of this, so that rows do not change every second


class SwarmMap(Widget, module="map"):
    """Who serves which blocks, where tokens pass, and who has seen them; live.

    Args:
        swarm: what `connect` returned.

    Attributes:
        title: the model's name.
        num_blocks: how many blocks it has.
        headline: one sentence on whether it is whole.
        missing: the blocks that nobody serves.
        coverage: how many servers each block has, as runs ``[start, end, count]``; the count is
            None where none has it and it is at home.
        home: the blocks that run in this notebook, as runs ``[start, end]``.
        servers: the facts on each server, see `compact`.
        read: when they were read, in seconds of Unix time.
        route: who computes the blocks, as ``[peer, start, end]``.
        planned: whether that is the route of a new request, for want of tokens that passed.
        pace: ``[tokens, tokens per second, seconds per pass]``.
        bill: what was used since the notebook was attached, in one line.
        seen: what each server got from this notebook, by peer, see `account`.
        failovers: servers that were lost, see `NotebookTraffic.failovers`.
        connected: whether the notebook still is.
        selected: the peer id of the row that a user has chosen, or empty.
    """

    title: String = traitlets.Unicode().tag(sync=True)
    num_blocks: Whole = traitlets.Int().tag(sync=True)
    headline: String = traitlets.Unicode().tag(sync=True)
    missing: traitlets.List[int] = traitlets.List(traitlets.Int()).tag(sync=True)
    coverage: traitlets.List[list[int | None]] = traitlets.List().tag(sync=True)
    home: traitlets.List[list[int]] = traitlets.List().tag(sync=True)
    servers: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    read: Real = traitlets.Float().tag(sync=True)
    route: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    planned: Flag = traitlets.Bool(True).tag(sync=True)
    pace: traitlets.List[float] = traitlets.List([0, 0.0, 0.0]).tag(sync=True)
    bill: String = traitlets.Unicode().tag(sync=True)
    seen: traitlets.Dict[str, list[Any]] = traitlets.Dict().tag(sync=True)
    failovers: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    connected: Flag = traitlets.Bool(True).tag(sync=True)
    selected: String = traitlets.Unicode().tag(sync=True)

    def __init__(self, swarm: Swarm, **options: Any) -> None:
        self._swarm, self._events = swarm, swarm.events()
        self._traffic = NotebookTraffic(self._events.before)
        self._status = swarm.status(refresh=False)
        self._next_facts = 0.0
        self._telling = threading.Lock()
        title, blocks = self._status.title, self._status.num_blocks
        super().__init__(title=title, num_blocks=blocks, **options)
        self._beat()
        start_pulse(self._beat, PERIOD)

    def summary(self) -> str:
        """The model and whether it is whole."""
        return f"{self.title}, {self.headline}"

    def picture(self) -> str:
        """The servers, and what they have seen."""
        bill = self._swarm.bill()
        used = bill.as_html() if bill.servers else ""
        return self._status.as_html() + used

    def close(self) -> None:
        """End the views and stop watching."""
        self._events.close()
        super().close()

    @action
    def refresh(self) -> None:
        """Ask the swarm now, instead of within seconds."""
        self._swarm.status()
        self._tell_facts()

    def _beat(self) -> bool:
        events = self._events.drain()
        self._traffic.take(events)
        rate, seconds = self._traffic.speed()
        changed: dict[str, Any] = {
            "pace": [self._traffic.tokens, float(f"{rate:.3g}"), float(f"{seconds:.3g}")],
        }
        if events:
            changed |= {
                **self._route(),
                "failovers": self._traffic.failovers(),
            }
        self.update(**changed)
        lost = any(isinstance(event, Failover) for event in events)
        if lost or time.monotonic() >= self._next_facts:
            self._tell_facts()
        return self.connected

    def _tell_facts(self) -> None:
        """Send what is new of the servers; called by the pulse and by `refresh`."""
        # One after the other: else the older facts of two could be sent last, and stay.
        with self._telling:
            self._next_facts = time.monotonic() + FACTS_PERIOD
            before, status = self._status, self._swarm.status(refresh=False)
            self._status = status
            bill = self._swarm.bill()
            changed: dict[str, Any] = {
                "bill": bill.line if bill.servers else "",
                "seen": {one.peer_id: account(one) for one in bill.servers},
                "connected": self._swarm.connected,
            }
            if status != before or not self.servers:
                changed |= {
                    "headline": status.headline,
                    "missing": status.missing,
                    "coverage": [list(run) for run in status.strip],
                    "home": [list(run) for run in status.home_runs],
                    "servers": [compact(row, status) for row in status.servers],
                    "read": float(round(status.read or 0)),
                }
                changed |= self._route()
            self.update(**changed)

    def _route(self) -> dict[str, Any]:
        """The way of the latest tokens; once a server of it is gone, that of a new request."""
        latest = self._traffic.route
        if latest and all_online(latest, self._status):
            return {"route": [list(part) for part in latest], "planned": False}
        try:
            hops = [hop for hop in self._swarm.route().hops if hop.peer_id]
        except MissingBlocks:
            hops = []
        return {"route": [[hop.peer_id, hop.start, hop.end] for hop in hops], "planned": True}


def all_online(route: Iterable[tuple[str, int, int]], status: SwarmStatus) -> bool:
    """Whether every server of a route still answers."""
    online = {row.peer_id for row in status.servers if row.state == "online"}
    return all(peer in online for peer, _, _ in route)


def compact(row: ServerRow, status: SwarmStatus) -> list[Any]:
    """A server as a list, which is a third of the same as a dict; `js/src/map.js` reads it."""
    return [
        row.peer_id,
        row.name,
        row.start,
        row.end,
        row.state,
        row.note,
        row.rtt and float(f"{row.rtt:.2g}"),
        row.throughput and float(f"{row.throughput:.3g}"),
        row.precision,
        row.cache_left,
        row.cache_total,
        row.version,
        _age(row.announced),
        _age(row.heard),
        block_slices(status.needed(row.peer_id)),
        row.retry,
        row.audits and list(row.audits),
    ]


def account(server: ServerBill) -> list[Any]:
    """What a server got: name, blocks, tokens, bytes sent and received, when last."""
    blocks = ", ".join(f"{start}:{end}" for start, end in server.blocks)
    return [server.name, blocks, server.tokens, server.sent, server.received, _age(server.last)]


def _age(moment: float | None) -> int | None:
    return None if moment is None else int(moment // AGE_SECONDS * AGE_SECONDS)
