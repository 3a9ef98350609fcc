"""Where a server of a private swarm is found again: the same peer id and the same port.

An invitation holds addresses, and whoever was invited keeps it. So the machine on which a swarm was
begun keeps, beside the swarm's key, the identity of each server that ran on it, and the port. The
first server of the machine takes the first identity again, the second the second: a lock says which
are in use, and the system takes it off when a process ends, however that happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

_ANY_PORT = re.compile(r"/ip4/([\d.]+)/tcp/0")
_PORT = re.compile(r"/tcp/(\d+)(/|$)")


class Residence:
    """One of the places for servers in a swarm's folder, until it is left.

    Args:
        folder: the swarm's; it is there.

    Attributes:
        identity: the file of the peer's private key, which may not be there yet.
    """

    identity: Path

    def __init__(self, folder: Path) -> None:
        for number in itertools.count():
            self._lock = os.open(folder / f"server-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                continue
            break
        self.identity = folder / f"server-{number}.identity"
        self._port = folder / f"server-{number}.port"

    def listen(self, host_maddrs: Sequence[str]) -> list[str]:
        """Where to listen: at the port of last time, where any would do and it is free."""
        known = self._port.read_text() if self._port.exists() else ""
        if not known.isdecimal():
            return list(host_maddrs)
        return [
            one.removesuffix("0") + known
            if (any_port := _ANY_PORT.fullmatch(one)) and _is_free(any_port[1], int(known))
            else one
            for one in host_maddrs
        ]

    def keep(self, addresses: Sequence[str]) -> None:
        """Remember the port of the addresses at which the server is reached."""
        ports = [found[1] for found in map(_PORT.search, addresses) if found]
        if ports:
            self._port.write_text(ports[0])

    def leave(self) -> None:
        os.close(self._lock)


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as trial, contextlib.suppress(OSError, OverflowError):
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host, port))
        return True
    return False
