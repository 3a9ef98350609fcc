"""The joined call that is running in the torch thread, for those whom the decoder asks on its way.

Functions that transformers finds by name, operators of a recording and hooks get no argument that
says whose tokens they see. There is one torch thread, so they can look here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm_notebook.server.attention import JoinedCache
    from swarm_notebook.server.script import Script


@dataclass(slots=True, eq=False)
class Masks:
    """One mask (or None) per session of a call.

    Attributes:
        number: which of the masks of the call this is.
    """

    each: list[Any]
    number: int = 0


@dataclass(slots=True, eq=False)
class JoinedCall:
    """What a call of the blocks for several sessions is made of.

    Attributes:
        cache: its sessions.
        original: how the model attends by itself.
        script: of the recording that is made or replayed.
        masks: those that the model has asked for.
    """

    cache: JoinedCache
    original: str
    script: Script | None = None
    masks: list[Masks] = field(default_factory=list)


_running: JoinedCall | None = None


@contextmanager
def running(call: JoinedCall) -> Iterator[None]:
    """Let this be the call that `present` gives."""
    global _running
    _running = call
    try:
        yield
    finally:
        _running = None


def present() -> JoinedCall:
    """The call that is running."""
    if _running is None:
        raise RuntimeError("what belongs to joined calls was called outside of one")
    return _running
