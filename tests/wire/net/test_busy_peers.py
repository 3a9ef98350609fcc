"""Joining peers that have no time at first: their loop or their network daemon stands still."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import psutil
import pytest
from support.raw_wire import ServerProcess

from swarm_notebook.errors import ConnectionFailed
from swarm_notebook.net import bootstrap
from swarm_notebook.net.membership import joining
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.node import Node


@pytest.fixture
def server(tiny_llama: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(tiny_llama, tmp_path / "server.log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


@pytest.fixture
def private(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ServerProcess, str]]:
    """A server of a private swarm, and an invitation to it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    server = ServerProcess(tiny_llama, tmp_path / "server.log", "--private")
    try:
        server.wait_ready()
        (book,) = tmp_path.rglob("members.sqlite")
        yield server, str(Authority(book.parent).invite())
    finally:
        server.kill()


class _Told(logging.Handler):
    """Does something when this process says that it goes on asking."""

    def __init__(self, act: Callable[[], None]):
        super().__init__()
        self._act, self.texts = act, []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self._act()

    def __enter__(self) -> Self:
        bootstrap.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        bootstrap.logger.removeHandler(self)


def _part(server: ServerProcess, name: str) -> int:
    """The process whose loop, or whose network daemon, is to stand still."""
    if name == "loop":
        return server.process.pid
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child.pid for child in children if "p2pd" in child.name())


@contextmanager
def _still(pid: int) -> Iterator[Callable[[], None]]:
    """A process that stands still, and what lets it go on before the end of this."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _asked_again(server: ServerProcess, part: str, address: str, *, client: bool) -> None:
    """Whoever joins says that it asks again, and is let in by a peer that goes on only then."""
    with _still(_part(server, part)) as go_on, _Told(go_on) as told:
        assert asyncio.run(_join(address, client, bootstrap.PATIENCE)) == 1
    assert "no initial peer has answered yet; asking them for up to" in told.texts[0]


async def _join(address: str, client: bool, patience: float) -> int:
    node = await Node.start([address], client=client, patience=patience)
    try:
        return len(node.neighbours())
    finally:
        await node.stop()


@pytest.mark.parametrize(
    ("part", "client"), [("loop", True), ("daemon", False)], ids=["loop-notebook", "daemon-server"]
)
def test_a_peer_that_is_late_is_asked_again(server: ServerProcess, part: str, client: bool) -> None:
    """Hivemind asks once, for 3 s, and its daemon gives a neighbour 5 s for a handshake."""
    _asked_again(server, part, server.facts["maddrs"][0], client=client)


def test_a_peer_that_stays_silent_is_named(server: ServerProcess) -> None:
    address = server.facts["maddrs"][0]
    said = pytest.raises(ConnectionFailed, match=rf"{address}.*nothing said over it")
    with _still(_part(server, "loop")), said:
        asyncio.run(_join(address, True, 0.0))


def test_an_invitation_is_shown_again_to_a_server_that_is_late(
    private: tuple[ServerProcess, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "REDEEM_SECONDS", 1.0)
    server, invitation = private
    _asked_again(server, "loop", invitation, client=True)


def test_an_invitation_takes_no_longer_than_the_rest(private: tuple[ServerProcess, str]) -> None:
    """It had half a minute of its own, whatever was asked for."""
    server, invitation = private
    said = pytest.raises(ConnectionFailed, match="no server that redeems invitations")
    began = time.monotonic()
    with _still(_part(server, "loop")), said:
        asyncio.run(_join(invitation, True, 0.0))
    assert time.monotonic() - began < bootstrap.PATIENCE
