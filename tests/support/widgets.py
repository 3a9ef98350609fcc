"""What a widget's script does to it, and what its model then asks of servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.patience import wait_until

from swarm_notebook.client.request import Request
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.writer import StepRoute


def act(widget: Any, action: str, **arguments: Any) -> None:
    """As the script does it."""
    widget._handle_custom_msg({"action": action, "with": arguments}, [])


def until(holds: Callable[[], bool]) -> None:
    """Wait for what may not hold for long."""
    wait_until(holds, poll=0.005)


def tokens_sent(patch: pytest.MonkeyPatch, *, to_first: bool = False) -> list[int]:
    """Tokens of each request of sessions from now on, to all servers or those with block 0."""
    lengths: list[int] = []
    send = Hop.send

    async def counted(hop: Hop, request: Request, route: StepRoute) -> float:
        if hop.start == 0 or not to_first:
            lengths.append(request.hidden.shape[1])
        return await send(hop, request, route)

    patch.setattr(Hop, "send", counted)
    return lengths
