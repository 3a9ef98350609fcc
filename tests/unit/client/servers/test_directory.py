"""What a notebook keeps of servers, and for how long."""

from __future__ import annotations

import asyncio

from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.recent import FORGET_SECONDS
from swarm_notebook.client.servers.snapshot import Snapshot
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState

GONE = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
HERE = "QmbLHAnMoJPWSCR5Zhtx6BHJX9KiKNN6tpvbUcqanj75Nb"


def span(peer: str, state: ServerState = ServerState.ONLINE) -> ServerSpan:
    return ServerSpan(peer, 0, 2, ServerInfo(state=state, throughput=1.0))


def directory_with_peers() -> Directory:
    """As after days of use: everything that is kept by peer has something of both."""
    directory = Directory(None, "m", 2)  # type: ignore[arg-type]  # nothing is asked
    directory.note([span(GONE), span(HERE)], now=0.0)
    for peer in (GONE, HERE):
        directory.rtt[peer] = directory.heard[peer] = 1.0
        directory.uploaded[peer, "adapter"] = (1, 0, 2)
        assert not directory.upload_locks[peer].locked()
        directory.health.failed(peer, "it was slow")
        directory.health.silent(peer)
    directory.health.keep_apart(GONE, HERE)
    return directory


def everything(directory: Directory) -> str:
    return f"{vars(directory)} {vars(directory.health)}"


def test_a_peer_that_announces_nothing_for_long_is_forgotten() -> None:
    directory = directory_with_peers()
    directory.note([span(HERE)], now=FORGET_SECONDS)
    assert GONE in directory.rtt
    assert directory.health.kept_apart(GONE, HERE)
    directory.note([span(HERE)], now=FORGET_SECONDS + 1)
    assert GONE not in everything(directory)
    assert HERE in directory.rtt
    assert (HERE, "adapter") in directory.uploaded
    assert directory.avoided(HERE) == "it was slow"


def test_no_peer_is_forgotten_while_an_adapter_is_sent_to_it() -> None:
    directory = directory_with_peers()

    async def main() -> None:
        async with directory.upload_locks[GONE]:
            directory.note([], now=FORGET_SECONDS + 1)
            assert GONE in directory.upload_locks

    asyncio.run(main())
    directory.note([], now=FORGET_SECONDS + 1)
    assert GONE not in everything(directory)


def test_who_has_left_and_who_is_joining_is_said_of_blocks_that_nobody_holds() -> None:
    directory = Directory(None, "m", 2)  # type: ignore[arg-type]  # nothing is asked
    assert directory.who_had(0, 2) == ""
    gone, coming = span(GONE, ServerState.OFFLINE), span(HERE, ServerState.JOINING)
    directory.snapshot = Snapshot((gone, coming))
    said = directory.who_had(0, 2)
    assert f"{gone.name} has left" in said
    assert f"{coming.name} is just joining" in said
