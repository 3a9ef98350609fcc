"""hivemind's books of unary calls, which forget what has come to its end."""

from __future__ import annotations

import asyncio
from typing import Any

from hivemind.p2p import P2P


def mend(p2p: P2P) -> None:
    """To be called before there are any calls."""
    control = p2p._client.control
    control._pending_calls = _Waiting()
    control._handler_tasks = _Handled()


class _Waiting(dict[Any, asyncio.Future]):
    """Calls whose answer is waited for: one that was given up is not among them any more.

    hivemind looks a call up here before it hands over its answer. When the answer comes in the very
    turn of the loop in which the call runs out of time, it would raise, and never read again: the
    node would be deaf to all answers from then on.
    """

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


class _Handled(dict[Any, asyncio.Task]):
    """Calls that are answered at present.

    hivemind leaves those in here that are taken back before they are answered, for ever, with all
    the bytes of the request: a notebook could fill a server's memory by asking and giving up.
    """

    def __setitem__(self, call: Any, task: asyncio.Task) -> None:
        super().__setitem__(call, task)
        task.add_done_callback(lambda _: self.pop(call, None))
