"""How long a piece of long work may take, so that others are served fairly. No torch, no clock.

Whoever decodes, or sends short passes, has a turn again and again: a call, and a pause until the
answer has travelled, was worked on, and the next work is here. What comes while a piece of somebody
else's long work runs waits for its end. So a piece takes about as long as a turn of theirs: they
come on at half their pace at worst, as two that share a machine do. Work that is alone, or beside
other long work only, comes in large pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarm_notebook.server.engine.scheduling.scheduler import Kind, Task

# Seconds that a piece may take. Beside others: about the time between two tokens that a reader
# still sees as fluent. Alone: an interrupt takes effect within C5's half second.
CROWDED_SECONDS = 0.06
ALONE_SECONDS = 0.5
# Whose next work takes longer to come does not decode: a token over two continents takes less.
DECODING_SECONDS = 1.0
# The newest turn's weight in the running mean, if it is quicker than that (half is forgotten after
# two) and if it is slower. A turn may be slow for the very piece that it waited for, and longer
# pieces would follow from that: with one weight for both, on a busy machine, pieces of 12 to 30 ms
# were measured beside a client whose turns take 5 to 10 ms.
_QUICKER, _SLOWER = 0.3, 0.05


@dataclass(slots=True)
class _Turns:
    """A client's turns.

    Attributes:
        answered: when its last short work was done.
        pause: seconds from there to its next one; None while there was none.
        seconds: a whole turn, as it is when little holds it up; None before the first one.
    """

    answered: float
    pause: float | None = None
    seconds: float | None = None

    def ran(self, seconds: float, now: float) -> None:
        if self.pause is not None:
            turn = self.pause + seconds
            if self.seconds is not None:
                newest = _QUICKER if turn < self.seconds else _SLOWER
                turn = newest * turn + (1 - newest) * self.seconds
            self.seconds = turn
        self.answered, self.pause = now, None


class Turns:
    """Learns the turns of all clients. Told in the torch thread, asked anywhere."""

    def __init__(self) -> None:
        self._clients: dict[str, _Turns] = {}

    def came(self, task: Task, now: float) -> None:
        """Work has arrived."""
        client = self._clients.get(task.client)
        if client is None or client.pause is not None or task.kind is Kind.PREFILL_CHUNK:
            return
        if (pause := now - client.answered) < DECODING_SECONDS:
            client.pause = max(pause, 0.0)

    def ran(self, tasks: Iterable[Task], seconds: float, now: float) -> None:
        """Short work has run, as one call of so many seconds; it is at most a piece long."""
        for name in {task.client for task in tasks}:
            if name in self._clients:
                self._clients[name].ran(seconds, now)
            elif name:
                self._clients[name] = _Turns(now)
        gone = [
            name for name, one in self._clients.items() if now - one.answered > DECODING_SECONDS
        ]
        for name in gone:
            del self._clients[name]

    def piece_seconds(self, client: str, now: float, *, others_wait: bool) -> float:
        """How long the next piece of a client's long work may take.

        Args:
            others_wait: whether work of anybody else does.
        """
        turns = [
            one.seconds
            for name, one in list(self._clients.items())
            if name != client and now - one.answered < DECODING_SECONDS
        ]
        if not turns:
            return CROWDED_SECONDS if others_wait else ALONE_SECONDS
        return min([CROWDED_SECONDS, *(seconds for seconds in turns if seconds is not None)])
