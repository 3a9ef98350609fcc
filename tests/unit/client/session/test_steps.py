"""How steps are written, in the order in which a server works on them."""

from __future__ import annotations

import torch

from swarm_notebook.client.request import Request
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.writer import StepRoute, StepWriter
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState
from swarm_notebook.net.wire import protocol


def test_blocks_go_without_saying_only_after_a_step_for_the_same() -> None:
    """A step that is sent again is worked on in its old place, not behind what was sent last."""
    info = ServerInfo(
        state=ServerState.ONLINE, throughput=1.0, swarm_notebook=protocol.PROTOCOL_VERSION
    )
    directory = Directory(None, "m", 4)  # type: ignore[arg-type]  # nothing is sent
    writer = StepWriter(RouteSegment(ServerSpan("Qm", 0, 4, info), 0, 4), directory, 64)
    lower, upper = (Request(*blocks, torch.zeros(1, 1, 8), 0) for blocks in ((0, 2), (2, 4)))

    def uid(request: Request, *, again: bool = False) -> str:
        return writer.write(request, StepRoute("step"), again=again).uid

    assert [uid(lower), uid(lower), uid(upper)] == ["m.0 m.1", "", "m.2 m.3"]
    assert uid(lower, again=True) == "m.0 m.1"
    assert [uid(upper), uid(lower)] == ["", "m.0 m.1"]
