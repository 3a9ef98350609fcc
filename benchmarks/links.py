"""Machines that are far apart, on this one: network namespaces, and a switch that takes its time.

Every namespace has one interface, a TUN device whose other end this process holds. `Switch`
forwards IP packets between them as ``tc netem`` would (delay, jitter, loss, rate), but per pair of
machines, and also on kernels that come without netem. Only addresses of these namespaces are used;
nothing leads outside. It takes root, ``ip`` (Debian's iproute2) and ``/dev/net/tun``.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Self

SUBNET = "10.213.0"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 1500


@dataclass(frozen=True)
class Link:
    """One direction between two machines.

    Attributes:
        delay, jitter: seconds; the jitter is the standard deviation. Packets keep their order.
        loss: share of packets that are lost.
        rate: bytes per second, or None for no limit.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float | None = None


class Switch(threading.Thread):
    """Forwards packets between TUN devices, each in its time."""

    def __init__(self, devices: list[int]):
        super().__init__(name="switch", daemon=True)
        self.link = Link()
        self._devices = devices
        self._ended = threading.Event()
        self._chance = random.Random(0)
        # When the last packet of a direction has left the sender, and has arrived.
        self._sent: dict[tuple[int, int], float] = {}
        self._arrived: dict[tuple[int, int], float] = {}

    def run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        number = itertools.count()
        with selectors.SelectSelector() as selector:
            for index, device in enumerate(self._devices):
                os.set_blocking(device, False)
                selector.register(device, selectors.EVENT_READ, index)
            while not self._ended.is_set():  # select, not epoll: that one waits whole milliseconds
                pause = 0.1 if not waiting else max(0.0, waiting[0][0] - time.monotonic())
                for key, _ in selector.select(min(pause, 0.1)):
                    while (packet := _read(key.fd)) is not None:
                        target = self._receiver(packet)
                        due = self._due(key.data, target, len(packet))
                        if due is not None and target is not None:
                            heapq.heappush(waiting, (due, next(number), target, packet))
                while waiting and waiting[0][0] <= time.monotonic():
                    _, _, target, packet = heapq.heappop(waiting)
                    os.write(self._devices[target], packet)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _receiver(self, packet: bytes) -> int | None:
        """The machine that an IPv4 packet is for."""
        if packet[0] >> 4 != 4 or packet[16:19] != bytes(map(int, SUBNET.split("."))):
            return None
        index = packet[19] - 1
        return index if 0 <= index < len(self._devices) else None

    def _due(self, source: int, target: int | None, size: int) -> float | None:
        link, now = self.link, time.monotonic()
        if target is None or self._chance.random() < link.loss:
            return None
        way = source, target
        leaves = now
        if link.rate is not None:
            leaves = max(now, self._sent.get(way, 0.0)) + size / link.rate
            self._sent[way] = leaves
        delay = link.delay + (abs(self._chance.gauss(0, link.jitter)) if link.jitter else 0.0)
        self._arrived[way] = max(leaves + delay, self._arrived.get(way, 0.0))
        return self._arrived[way]


class Machines:
    """Namespaces that are there within the context, with one switch between them."""

    def __init__(self, count: int):
        self._names = [f"sn{os.getpid()}-{index}" for index in range(count)]
        self._devices: list[int] = []
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            for index, name in enumerate(self._names):
                _ip("netns", "add", name)
                self._made.append(name)
                device = f"t{os.getpid()}-{index}"
                self._devices.append(_tun(device))
                _ip("link", "set", device, "netns", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "mtu", str(_MTU), "up")
            self.switch = Switch(self._devices)
            self.switch.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.switch.stop()
        self._clean()

    def address(self, index: int) -> str:
        return f"{SUBNET}.{index + 1}"

    def command(self, index: int, *words: str) -> list[str]:
        """A command that runs on one of the machines."""
        return ["ip", "netns", "exec", self._names[index], *words]

    def _clean(self) -> None:
        for device in self._devices:
            os.close(device)
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


def _read(device: int) -> bytes | None:
    try:
        return os.read(device, 65536)
    except BlockingIOError:
        return None
