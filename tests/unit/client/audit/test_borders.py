"""Who is named by disputes that stayed open."""

from __future__ import annotations

import torch

from swarm_notebook.client.audit.borders import Dispute, Disputes
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState

INFO = ServerInfo(state=ServerState.ONLINE, throughput=1.0)


def dispute(sender: str, receiver: str) -> Dispute:
    ends = (RouteSegment(ServerSpan(peer, 0, 9, INFO), 0, 9) for peer in (sender, receiver))
    return Dispute(*ends, torch.zeros(1, 1, 4))


def test_who_is_contradicted_by_two_is_named() -> None:
    disputes = Disputes()
    assert disputes.add(dispute("ann", "mallory")) is None
    assert disputes.add(dispute("ann", "mallory")) is None  # by the same again
    found = disputes.add(dispute("mallory", "bob"))
    assert found is not None
    assert found.segment.peer == "mallory"
    assert len(found.by) == 2


def test_two_who_are_both_contradicted_by_others_are_not_told_apart() -> None:
    disputes = Disputes()
    assert disputes.add(dispute("ann", "mallory")) is None
    assert disputes.add(dispute("bob", "eve")) is None
    assert disputes.add(dispute("mallory", "eve")) is None


def test_what_a_liar_said_counts_against_nobody() -> None:
    disputes = Disputes()
    assert disputes.add(dispute("ann", "mallory")) is None
    disputes.forget("mallory")
    assert disputes.add(dispute("ann", "bob")) is None
