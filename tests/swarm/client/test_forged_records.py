"""What strangers store in servers' names, and how they drown what servers say, on real servers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID
from support.hostile_keeper import HostileKeeper, false_record
from support.hosting import HostedSwarm
from support.scene import TOLERANCE
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.net.dht.records import MODEL_INDEX_KEY, ServerState
from swarm_notebook.net.dht.storage import MAX_KEY_BYTES
from swarm_notebook.net.wire import protocol
from swarm_notebook.swarm import Swarm

UIDS = [protocol.block_uid("tiny-llama", index) for index in range(5)]


@dataclass
class Attack:
    """Two servers, a notebook that was there before, and a hostile peer of their DHT."""

    hosted: HostedSwarm
    hostile: HostileKeeper
    swarm: Swarm
    folder: Path
    reference: Any

    @property
    def servers(self) -> list[str]:
        return [server.peer_id for server in self.hosted.servers]

    @torch.no_grad()
    def is_no_harm(self) -> None:
        """Neither to the notebook that was there nor to a new one."""
        ids = torch.arange(3, 12)[None]
        expected = self.reference(ids).logits
        self.swarm.status()
        began = time.monotonic()
        with sn.connect(self.hosted.initial_peers, model=self.folder) as fresh:
            print(f"a fresh notebook is there after {time.monotonic() - began:.1f} s")
            for swarm in (self.swarm, fresh):
                spans = swarm.connection.directory.snapshot.spans
                online = {(span.peer, span.start, span.end) for span in spans}
                first, second = self.servers
                assert online == {(first, 0, 2), (second, 2, 5)}
                assert {span.info.state for span in spans} == {ServerState.ONLINE}
                torch.testing.assert_close(
                    swarm.model(ids).logits, expected, atol=TOLERANCE, rtol=0
                )


@pytest.fixture(scope="module")
def attack(tiny_llama: Path) -> Iterator[Attack]:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with (
        HostedSwarm(tiny_llama, [(0, 2), (2, 5)]) as hosted,
        HostileKeeper(hosted.initial_peers) as hostile,
        sn.connect(hosted.initial_peers, model=tiny_llama) as swarm,
    ):
        yield Attack(hosted, hostile, swarm, tiny_llama, reference)


@pytest.mark.parametrize("uids", [UIDS[:1], UIDS], ids=["one key", "all keys"])
def test_lies_in_a_servers_name(attack: Attack, uids: list[str]) -> None:
    """That it is offline, or has other blocks; stored at every server, and told by a keeper."""
    for lie in (false_record(ServerState.OFFLINE), false_record(ServerState.ONLINE)):
        records = dict.fromkeys(attack.servers, lie)
        for uid in uids:
            attack.hostile.answer(uid, records)
            for server in attack.servers:
                taken = attack.hostile.store_at(server, uid, records)
                assert not taken[UIDS.index(uid) >= 2]  # that of who serves the block
        attack.is_no_harm()


def test_a_keeper_that_answers_with_something_else(attack: Attack) -> None:
    for uid in UIDS:
        attack.hostile.answer_plainly(uid, "nothing here")
    attack.is_no_harm()


def test_a_key_that_is_drowned(attack: Attack) -> None:
    """6 MiB under names that are made up, under every key, and as the answer of a keeper."""
    records = {f"made up {number}": bytes(6 << 10) for number in range(1024)}
    for uid in UIDS:
        attack.hostile.answer(uid, records)
    for server in attack.servers:
        taken = attack.hostile.store_at(server, UIDS[0], records)
        assert sum(taken) * (6 << 10) <= MAX_KEY_BYTES
        # In all, one peer may store so much; the next key has room for servers.
        attack.hostile.store_at(server, UIDS[1], records)
    attack.is_no_harm()
    for uid in UIDS:
        attack.hostile.answer(uid, {})


def test_servers_that_do_not_exist_are_not_used(attack: Attack) -> None:
    """They boast of any speed under every key; none answers a ping."""
    boast = false_record(ServerState.ONLINE)
    names = [PeerID(b"\x12\x20" + bytes([number] * 32)).to_base58() for number in range(40)]
    for uid in UIDS:
        attack.hostile.answer(uid, dict.fromkeys(names, boast))
    ids = torch.arange(3, 12)[None]
    with sn.connect(attack.hosted.initial_peers, model=attack.folder) as fresh, torch.no_grad():
        for swarm in (attack.swarm, fresh):
            found = swarm.model(ids).logits
            torch.testing.assert_close(found, attack.reference(ids).logits, atol=TOLERANCE, rtol=0)
            route = swarm.connection.directory.route()
            assert {segment.peer for segment in route} == set(attack.servers)
    for uid in UIDS:
        attack.hostile.answer(uid, {})


def test_a_thousand_models_that_nobody_serves(attack: Attack) -> None:
    """5 MiB under the key of all models: who looks at the swarm sees the one that is served."""
    rubbish = {"num_blocks": 60000, "repository": "x" * 400, "more": "x" * 4000}
    models = {f"model-{number}": rubbish for number in range(1200)}
    for server in attack.servers:
        attack.hostile.store_at(server, MODEL_INDEX_KEY, models)
    began = time.monotonic()
    status = sn.look(attack.hosted.initial_peers)
    print(f"looked after {time.monotonic() - began:.1f} s")
    assert (status.model, status.missing) == ("tiny-llama", [])


def test_records_of_a_mebibyte_are_not_kept(attack: Attack) -> None:
    records = {f"large {number}": bytes(1 << 20) for number in range(8)}
    assert not any(attack.hostile.store_at(attack.servers[0], "any key", records))
    nameless = attack.hostile.store_at(attack.servers[0], UIDS[0], {None: b"a value"})
    assert not any(nameless)


def test_servers_that_no_keeper_knows_are_asked(attack: Attack) -> None:
    """All that was kept is gone: the peers that a notebook knows say themselves what they serve."""
    for server in attack.hosted.servers:
        server.forget_records()
    attack.is_no_harm()
    for server in attack.hosted.servers:
        server.announce()  # as each does within its period: other tests rest on what is kept
