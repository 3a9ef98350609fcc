"""The attacks of `make hostile` in small: how they are refused, and that memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from hivemind.p2p import P2PHandlerError
from support import attacks
from support.attacking import BARE, Attack, Target
from support.hosting import HostedSwarm
from support.memory import Peak
from support.patience import wait_until
from support.raw_wire import RawClient, ServerProcess
from support.tiny import tiny_model

from swarm_notebook.errors import BadRequest, ServerBusy
from swarm_notebook.net.wire import conduct
from swarm_notebook.net.wire.stream_server import STREAM_BYTES

BUDGET, BEYOND = 64 << 20, 64 << 20
SECONDS = 2.0

Setting = tuple[Target, RawClient, ServerProcess]


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Target, RawClient, ServerProcess]]:
    folder: Path = tiny_model("llama", tmp_path_factory.mktemp("models"))
    options = ["--blocks", "0:5", "--traffic-bytes", str(BUDGET)]
    server = ServerProcess(folder, folder.parent / "server.log", *options)
    try:
        server.wait_ready()
        with closing(RawClient(server.facts["maddrs"])) as client:
            made = Target(client.node, server.peer, folder.name, (0, 5), 48, SECONDS, tokens=256)
            yield made, client, server
    finally:
        server.kill()


def run(target: Setting, attack: Attack) -> list[Exception]:
    """What the server says to an attack; afterwards it holds nothing."""
    made, client, server = target
    peak = Peak(server.facts["pid"])
    errors: list[Exception] = client.run(attack(made))
    assert peak.bytes < BUDGET + BEYOND
    wait_until(lambda: client.run(client.info(made.peer))["traffic_bytes_held"] < 1 << 20)
    return errors


def test_unfinished_requests(target: Setting) -> None:
    """Those beyond its share wait; all end, and nothing stays."""
    run(target, attacks.unfinished)


def test_answers_that_nobody_reads(target: Setting) -> None:
    run(target, attacks.unread_answers)


def test_outputs_of_modules_inside_of_blocks(target: Setting) -> None:
    run(target, attacks.inner_modules)


def test_a_peer_that_is_pushed_to_and_answers_without_end(target: Setting) -> None:
    address = target[2].facts["maddrs"][0]
    run(target, lambda made: attacks.push_to_a_drip(made, address))


def test_a_flood_of_streams_is_refused_in_words(target: Setting) -> None:
    """Every stream beyond what a peer may have is told so, none is closed without a reason."""
    count = (BUDGET // 2 // STREAM_BYTES) + 200
    errors = run(target, lambda made: attacks.push_streams(made, count))
    assert not [error for error in errors if isinstance(error, BARE)]
    assert len(errors) >= 200
    assert {type(error) for error in errors} == {ServerBusy}


def test_frames_that_would_grow_and_who_sends_them_is_heard_late(target: Setting) -> None:
    """Each is refused for what it is; whoever goes on is told to be late, and nobody else is."""
    made, client, server = target
    once = replace(made, seconds=0.0)
    attempts: tuple[Attack, ...] = (
        attacks.empty_tensors,
        lambda _: attacks.narrow_rows(once, 12),
    )
    for attack in attempts:
        errors = run(target, attack)
        assert {type(error) for error in errors} <= {BadRequest, ServerBusy}
        assert any(isinstance(error, BadRequest) for error in errors)
    (late,) = client.run(attacks.malformed(once, 1))
    assert "times of late, so it is heard" in str(late)
    with closing(RawClient(server.facts["maddrs"])) as honest:
        (error,) = honest.run(attacks.malformed(replace(once, node=honest.node), 1))
    assert isinstance(error, BadRequest)
    assert "late" not in str(error)


@pytest.fixture
def two(tiny_llama: Path) -> Iterator[tuple[Target, RawClient, RawClient]]:
    """A server in this process, what the first of two peers asks of it, and both."""
    with HostedSwarm(tiny_llama, [(0, 5)]) as servers, ExitStack() as ends:
        peers = servers.initial_peers
        first, second = (ends.enter_context(closing(RawClient(peers))) for _ in range(2))
        peer = servers.servers[0].peer
        yield Target(first.node, peer, tiny_llama.name, (0, 5), 48, 0.0, tokens=256), first, second


def test_who_never_stops_is_cut_off_and_nobody_else(
    two: tuple[Target, RawClient, RawClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streams end unread and its calls are refused; what others ask is answered."""
    monkeypatch.setattr(conduct, "CUT_AFTER", 0.0)
    made, flood, honest = two
    flood.run(attacks.malformed(made, int(conduct.FREE_REFUSALS) + 8))
    errors = flood.run(attacks.malformed(made, 8))
    assert len(errors) == 8
    assert all(isinstance(error, BARE) for error in errors)
    with pytest.raises(P2PHandlerError, match="busy: this peer is cut off"):
        flood.run(flood.info(made.peer))
    (error,) = honest.run(attacks.malformed(replace(made, node=honest.node), 1))
    assert isinstance(error, BadRequest)
    assert "late" not in str(error)
    assert honest.run(honest.info(made.peer))["traffic_bytes_held"] < 1 << 20


def test_new_identities_pay_together_and_newcomers_are_served(
    two: tuple[Target, RawClient, RawClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what is free for all of an address, who was answered nothing yet is heard late."""
    monkeypatch.setattr(conduct, "FREE_AT_ADDRESS", 16.0)
    made, first, second = two
    first.run(attacks.malformed(made, 24))
    made = replace(made, node=second.node)
    (late,) = second.run(attacks.malformed(made, 1))
    assert "new at its address were refused too many times" in str(late)
    assert second.run(attacks.ask_honestly(made)) is not None
    (error,) = second.run(attacks.malformed(made, 1))
    assert "late" not in str(error)
