"""What a server answered to a step, and where the time of it went."""

from __future__ import annotations

import time
from dataclasses import dataclass

from swarm_notebook.client.request import Outputs, Request, ServerReport
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.telemetry import HopTimes


@dataclass(slots=True)
class HopAnswer:
    """What a server answered to a step.

    Attributes:
        report: what the server says besides.
        received: when it came.
        since: when the answer before it came; until then the server had other work of this session.
        print: of the output as it came, by the seed of the server that it is pushed to, too.
        digest: of the same (`hand_overs.digest`).
    """

    outputs: Outputs
    report: ServerReport
    received: float
    since: float
    print: int | None = None
    digest: bytes = b""

    def times(
        self,
        segment: RouteSegment,
        request: Request,
        began: float,
        packed: float,
        *,
        awaited: bool = True,
    ) -> HopTimes:
        """Where the time of a step went: packed from ``began`` to ``packed``, then answered.

        Args:
            segment: the server.
            request: the step.
            awaited: reading the answer was waited for. It was not where the next server's answer
                was waited for meanwhile: that time counts there.

        The parts of a long prompt wait for the server together, and are not counted while they do.
        """
        waited = max(self.received - max(packed, self.since), 0.0)
        serialisation, queue, compute = self.report.times_within(waited)
        reading = time.perf_counter() - self.received if awaited else 0.0
        return HopTimes(
            segment.peer,
            segment.span.name,
            request.start,
            request.end,
            serialisation + packed - began + reading,
            max(waited - serialisation - queue - compute, 0.0),
            queue,
            compute,
        )
