"""Records anybody may store in a server's name, on real servers."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from hivemind.p2p import PeerID
from support.hosting import HostedSwarm
from support.raw_wire import RawClient
from support.scene import TOLERANCE
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.net import protocol
from swarm_notebook.net.records import ServerInfo, ServerState


def store(client: RawClient, peer: str, state: ServerState, seconds: float) -> None:
    """Under all blocks of the tiny model."""
    info = ServerInfo(state=state, throughput=1e9, inference_rps=1e9, start_block=0, end_block=5)
    uids = [protocol.block_uid("tiny-llama", index) for index in range(5)]
    work = client.node.dht.store_many(
        uids, [info.to_record()] * 5, time.time() + seconds, subkeys=[peer] * 5
    )
    client.run(work)


@torch.no_grad()
def test_a_span_is_believed_only_as_its_server_states_it(tiny_llama: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.arange(3, 12)[None]
    with HostedSwarm(tiny_llama, [(0, 2), (2, 5)]) as hosted:
        first = hosted.servers[0].peer_id
        client = RawClient(hosted.initial_peers)
        try:
            info = client.run(client.info(PeerID.from_base58(first)))
            assert (info["start_block"], info["end_block"]) == (0, 2)
            store(client, first, ServerState.ONLINE, 500.0)
            with sn.connect(hosted.initial_peers, model=tiny_llama) as swarm:
                directory = swarm.connection.directory
                claimed = directory._announced.holders()
                assert first in claimed[4], "the false record has not come"
                spans = {span.peer: (span.start, span.end) for span in directory.snapshot.spans}
                assert spans[first] == (0, 2)
                ours, theirs = swarm.model(ids).logits, reference(ids).logits
                torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
                assert not directory.avoided(first)
        finally:
            client.close()


@torch.no_grad()
def test_offline_for_a_month_hides_nobody(tiny_llama: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ids = torch.arange(3, 12)[None]
    with HostedSwarm(tiny_llama, [(0, 5)]) as hosted:
        client = RawClient(hosted.initial_peers)
        try:
            store(client, hosted.servers[0].peer_id, ServerState.OFFLINE, 30 * 86400.0)
            with sn.connect(hosted.initial_peers, model=tiny_llama) as swarm:
                ours, theirs = swarm.model(ids).logits, reference(ids).logits
                torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
        finally:
            client.close()
