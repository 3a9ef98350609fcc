"""The switch that the benchmarks put between far machines: what it does to packets, and to TCP.

Bounds are wide on the side where a busy machine may be late, and close on the side where only a
switch that does not hold its packets back could be early.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from distance import pass_bound
from links import MTU, PROFILES, SUBNET, Link, Machines, Switch

LATE = 2.0  # seconds by which a busy machine may be late
CAN_BUILD = os.geteuid() == 0 and Path("/dev/net/tun").exists() and shutil.which("ip") is not None

# Answers what it gets, byte by byte; or asks, as it is told line by line, and says the seconds.
ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7007))
print(flush=True)
one, _ = listener.accept()
one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := one.recv(65536):
    one.sendall(data)
"""
ASK = """
import json, os, socket, sys, threading, time
one = socket.create_connection((sys.argv[1], 7007))
one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print(flush=True)
for line in sys.stdin:
    sent = os.urandom(int(line))
    began = time.monotonic()
    threading.Thread(target=one.sendall, args=[sent]).start()
    got = b""
    while len(got) < len(sent):
        got += one.recv(65536)
    print(json.dumps([time.monotonic() - began, got == sent]), flush=True)
"""


class Wire:
    """Two ends whose packets pass a switch: the devices are sockets that keep packets apart."""

    def __init__(self, seed: int = 0) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        self.ends, self._inner = zip(*pairs, strict=True)
        self.switch = Switch([one.fileno() for one in self._inner], seed)
        self.switch.start()

    def packet(self, number: int, source: int, size: int) -> bytes:
        subnet = bytes(map(int, SUBNET.split(".")))
        head = bytes([0x45]) + bytes(11) + subnet + bytes([source + 1])
        return (head + subnet + bytes([2 - source]) + number.to_bytes(4)).ljust(size, b"x")

    def pass_(
        self, count: int, link: Link, *, source: int = 0, size: int = 100
    ) -> dict[int, float]:
        """Send packets all at once; when which of them arrived, in seconds."""
        self.switch.link = link
        target, found = self.ends[1 - source], {}
        target.settimeout(link.delay + 20 * link.jitter + LATE)
        began = time.monotonic()
        for number in range(count):
            self.ends[source].send(self.packet(number, source, size))
        try:
            while len(found) < count:
                number = int.from_bytes(target.recv(MTU)[20:24])
                found[number] = time.monotonic() - began
        except TimeoutError:
            pass
        return found

    def close(self) -> None:
        self.switch.stop()
        for one in (*self.ends, *self._inner):
            one.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def test_a_packet_takes_its_time_in_both_directions(wire: Wire) -> None:
    for source in (0, 1):
        found = wire.pass_(3, Link(delay=0.05), source=source)
        assert list(found) == [0, 1, 2]
        assert all(0.05 <= seconds < 0.05 + LATE for seconds in found.values())


def test_jitter_spreads_packets_and_keeps_their_order(wire: Wire) -> None:
    alone = [wire.pass_(1, Link(delay=0.01, jitter=0.01))[0] for _ in range(20)]
    assert min(alone) >= 0.01
    assert max(alone) - min(alone) > 0.01
    together = wire.pass_(40, Link(delay=0.01, jitter=0.01))
    assert list(together) == list(range(40))


def test_chances_are_of_a_direction_and_a_seed() -> None:
    def lost(seed: int, *ways: tuple[int, int]) -> list[bool]:
        """Of the first way, with packets of the others in between."""
        switch = Switch([0, 1], seed)
        switch.link = Link(loss=0.3)
        rounds = [[switch._due(*way, 100) is None for way in ways] for _ in range(300)]
        return [first for first, *_ in rounds]

    there, back = (0, 1), (1, 0)
    assert lost(1, there) == lost(1, there, back)
    assert lost(1, there) != lost(1, back)
    assert lost(1, there) != lost(2, there)
    assert 50 < sum(lost(1, there)) < 130


def test_a_rate_is_a_queue_and_a_full_queue_loses_what_comes(wire: Wire) -> None:
    found = wire.pass_(20, Link(delay=0.02, rate=50_000), size=500)  # 10 ms per packet
    assert len(found) == 20
    assert all(seconds >= 0.02 + 0.01 * (number + 1) for number, seconds in found.items())
    # The other direction is free meanwhile.
    assert wire.pass_(1, Link(delay=0.02, rate=50_000), source=1, size=500)[0] < 0.03 + LATE
    time.sleep(0.05)
    short = wire.pass_(20, Link(rate=5_000, queue=2_000), size=500)
    assert 4 <= len(short) < 20
    assert list(short) == sorted(short)
    assert all(later - one > 0.05 for one, later in pairwise(short.values()))


def test_what_is_for_nobody_here_goes_nowhere(wire: Wire) -> None:
    wire.ends[0].send(bytes([0x45]) + bytes(99))
    wire.ends[0].send(bytes([0x60]) + bytes(99))
    assert list(wire.pass_(1, Link())) == [0]


def test_a_bound_counts_each_way_of_a_pass() -> None:
    link = Link(delay=0.05, rate=1e6, loss=0.01)
    # 4 ms of work; 4 ways of 50 ms and 10 ms for the bytes, and 1 % of a round trip for each.
    assert pass_bound(4.0, link, ways=4, size=10_000) == pytest.approx(4 + 4 * 60 + 4 * 100 / 99)
    assert pass_bound(4.0, Link(), ways=4, size=10_000) == 4.0
    shaky = pass_bound(0.0, Link(jitter=0.01), ways=1, size=0)
    assert shaky == pytest.approx(7.98, abs=0.01)
    bounds = [pass_bound(0.0, link, ways=4, size=1000) for link in PROFILES.values()]
    assert bounds == sorted(bounds)


@pytest.mark.skipif(not CAN_BUILD, reason="network namespaces take root, ip and /dev/net/tun")
def test_tcp_of_two_machines_repairs_what_the_switch_does() -> None:
    with Machines(2) as machines:
        switch, address = machines.switch, machines.address(1)

        def start(machine: int, code: str) -> subprocess.Popen[str]:
            words = machines.command(machine, sys.executable, "-Ic", code, address)
            pipe = subprocess.PIPE
            started = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
            assert started.stdout is not None
            assert started.stdout.readline()
            return started

        def ask(size: int) -> float:
            assert asking.stdin is not None
            assert asking.stdout is not None
            print(size, file=asking.stdin, flush=True)
            seconds, same = json.loads(asking.stdout.readline())
            assert same
            return float(seconds)

        answering = start(1, ECHO)
        asking = start(0, ASK)
        try:
            switch.link = Link(delay=0.02)
            assert 0.04 <= ask(1) < 0.04 + LATE
            switch.link = Link(delay=0.02, rate=500_000)
            assert ask(150_000) >= 0.04 + 0.3
            # A packet that is lost alone waits for the kernel's timer, 200 ms on Linux.
            switch.link = Link(delay=0.02, jitter=0.002, loss=0.2)
            assert any(ask(1) > 0.2 for _ in range(60))
            switch.link = Link(delay=0.005, jitter=0.002, loss=0.05)
            ask(150_000)
        finally:
            for one in (asking, answering):
                one.kill()
                one.communicate()
