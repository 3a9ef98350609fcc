"""Machines of one host: network namespaces. Needs root and `ip`.

Those of `Networks` reach each other through one in the middle; their links can be cut, and made
slow or lossy where the kernel has netem. Those of `local_network` hang on one bridge.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Self

CAN_BUILD = os.geteuid() == 0 and shutil.which("ip") is not None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def local_network(count: int) -> Iterator[list[Sequence[str]]]:
    """Machines of one local network, where all hear what one says to all; gone with the context.

    Yields:
        of each, what precedes a command so that it runs there.
    """
    hub, *names = (f"lan-{os.getpid()}-{number}" for number in range(count + 1))
    with contextlib.ExitStack() as stack:
        for name in (hub, *names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", hub, "link", "set", "br0", "up")
        for number, name in enumerate(names, 1):
            inside = ("peer", "name", "eth0", "netns", name)
            _ip("-n", hub, "link", "add", f"v{number}", "type", "veth", *inside)
            _ip("-n", hub, "link", "set", f"v{number}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        yield [("ip", "netns", "exec", name) for name in names]


class Networks:
    """Some namespaces, gone with their context.

    Attributes:
        shapes: whether links can be made slow and lossy here.
    """

    def __init__(self, count: int):
        self._names = [f"chaos-{os.getpid()}-{number}" for number in range(count)]
        self._hub = f"chaos-{os.getpid()}-hub"
        self.shapes = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for name in [self._hub, *self._names]:
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("-n", name, "link", "set", "lo", "up")
            self._in_hub("sysctl", "-qw", "net.ipv4.ip_forward=1")
            for number, name in enumerate(self._names):
                inside = ("peer", "name", "eth0", "netns", name)
                _ip("-n", self._hub, "link", "add", f"v{number}", "type", "veth", *inside)
                self._up(number)
                _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("-n", name, "route", "add", "default", "via", f"10.77.{number}.1")
            self.shapes = self._shape(0, "delay", "1ms")
            self._unshape(0)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.{number}.2"

    def prefix(self, number: int) -> Sequence[str]:
        """What precedes a command so that it runs there."""
        return "ip", "netns", "exec", self._names[number]

    @contextlib.contextmanager
    def cut(self, number: int) -> Iterator[None]:
        """Nothing comes from there and nothing gets there, without a word."""
        _ip("-n", self._hub, "link", "set", f"v{number}", "down")
        try:
            yield
        finally:
            self._up(number)

    def move(self, number: int) -> None:
        """It is in another network from now on, with another address."""
        inside, gate = self._names[number], f"10.77.{100 + number}.1"
        _ip("-n", inside, "addr", "flush", "dev", "eth0")
        _ip("-n", self._hub, "addr", "flush", "dev", f"v{number}")
        _ip("-n", self._hub, "addr", "add", f"{gate}/24", "dev", f"v{number}")
        _ip("-n", inside, "addr", "add", f"10.77.{100 + number}.2/24", "dev", "eth0")
        _ip("-n", inside, "route", "replace", "default", "via", gate)

    @contextlib.contextmanager
    def shaped(self, number: int, *words: str) -> Iterator[None]:
        """Its link has these properties, in netem's words."""
        self._shape(number, *words)
        try:
            yield
        finally:
            self._unshape(number)

    def _up(self, number: int) -> None:
        _ip("-n", self._hub, "addr", "replace", f"10.77.{number}.1/24", "dev", f"v{number}")
        _ip("-n", self._hub, "link", "set", f"v{number}", "up")

    def _shape(self, number: int, *words: str) -> bool:
        command = ("tc", "qdisc", "replace", "dev", f"v{number}", "root", "netem", *words)
        return self._in_hub(*command).returncode == 0

    def _unshape(self, number: int) -> None:
        self._in_hub("tc", "qdisc", "del", "dev", f"v{number}", "root")

    def _in_hub(self, *command: str) -> subprocess.CompletedProcess[str]:
        words = ["ip", "netns", "exec", self._hub, *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)
