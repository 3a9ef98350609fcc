"""Machines that are far apart, on this one: network namespaces, and a switch that takes its time.

Every namespace has one interface, a TUN device whose other end this process holds. `Switch`
forwards IP packets between them as ``tc netem`` would (delay, jitter, loss, rate), but per pair of
machines, and also on kernels that come without netem. Only addresses of these namespaces are used;
nothing leads outside. It takes root, ``ip`` (Debian's iproute2) and ``/dev/net/tun``.

What is lost is a packet: the kernel's own TCP on the two machines finds that out and sends again,
so what loss costs a stream is measured, not modelled. A switch in Python forwards some thirty
thousand packets a second; above that (about 300 Mbit/s of full packets) it is the limit, not the
link.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import math
import os
import random
import selectors
import struct
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

SUBNET = "10.213.0"
MTU = 1500
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@dataclass(frozen=True)
class Link:
    """One direction between two machines.

    Attributes:
        delay: seconds.
        jitter: seconds; each packet takes longer by the magnitude of a normal variable of this
            deviation. Packets keep their order.
        loss: share of packets that are lost.
        rate: bytes per second, or None for no limit.
        queue: bytes that may wait for their turn at that rate; what comes then is lost.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float | None = None
    queue: int = 1000 * MTU

    @property
    def mean_delay(self) -> float:
        """What a packet that comes alone takes in the mean; seconds, without its time at `rate`."""
        return self.delay + self.jitter * math.sqrt(2 / math.pi)


def _profile(trip: float, jitter: float, loss: float, rate: float) -> Link:
    """Milliseconds there and back, milliseconds, percent and Mbit/s."""
    return Link(trip / 2000, jitter / 1000, loss / 100, rate * 125_000)


# Between two machines on good lines; no measurement of anybody's.
PROFILES = {
    "lan": _profile(0.5, jitter=0.05, loss=0, rate=1000),
    "city": _profile(8, jitter=0.5, loss=0.01, rate=300),
    "continent": _profile(40, jitter=2, loss=0.1, rate=100),
    "intercontinental": _profile(150, jitter=5, loss=0.5, rate=50),
}


class Switch(threading.Thread):
    """Forwards packets between TUN devices, each in its time.

    Args:
        devices: file descriptors; each read and each write is one packet.
        seed: of the chances, which every direction between two machines has for itself: the n-th
            packet that goes that way fares the same in every run.

    Attributes:
        link: every direction between two machines; may be exchanged at any time.
    """

    def __init__(self, devices: list[int], seed: int = 0):
        super().__init__(name="switch", daemon=True)
        self.link = Link()
        self._devices = devices
        self._ended = threading.Event()
        machines = range(len(devices))
        self._chances = {
            way: random.Random(f"{seed} {way}") for way in itertools.product(machines, repeat=2)
        }
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
                        if target is None:
                            continue
                        due = self._due(key.data, target, len(packet))
                        if due is not None:
                            heapq.heappush(waiting, (due, next(number), target, packet))
                while waiting and waiting[0][0] <= time.monotonic():
                    _, _, target, packet = heapq.heappop(waiting)
                    with suppress(BlockingIOError):  # its queue is full: one more packet is lost
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

    def _due(self, source: int, target: int, size: int) -> float | None:
        """When a packet arrives, or None if it is lost."""
        link, now, way = self.link, time.monotonic(), (source, target)
        chance = self._chances[way]
        lost, late = chance.random() < link.loss, abs(chance.gauss(0.0, link.jitter))
        leaves = now
        if link.rate is not None:
            begins = max(now, self._sent.get(way, 0.0))
            if (begins - now) * link.rate + size > link.queue:
                return None
            leaves = self._sent[way] = begins + size / link.rate
        if lost:  # on its way: it has taken its turn at the sender
            return None
        self._arrived[way] = max(leaves + link.delay + late, self._arrived.get(way, 0.0))
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
                _ip("-n", name, "link", "set", device, "mtu", str(MTU), "up")
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
