"""Work in pieces: the torch thread lets others have their turn after each (`worker`).

A function in pieces is a generator. First it yields 0 and is sent how much its first piece may
have; after each piece but the last it yields how much that had, and is sent the room of the next.
It returns the result with the last piece. All amounts are in the unit of `scheduler.Task.work`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Pieces = Generator[int, int, T]

_ALL = 1 << 60


def run_whole(pieces: Pieces[T], room: int = _ALL) -> T:
    """The result, after all pieces one behind the other; usually it is one."""
    try:
        next(pieces)
        while True:
            pieces.send(room)
    except StopIteration as end:
        result: T = end.value
        return result
