"""How much is audited where the user says nothing of it."""

from __future__ import annotations

from swarm_notebook.connecting import SPOT_RATE, audit_rate
from swarm_notebook.net.membership.certificate import Role
from swarm_notebook.net.membership.invitation import Invitation

PUBLIC = "/ip4/8.8.8.8/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
HERE = PUBLIC.replace("8.8.8.8", "127.0.0.1")


def test_open_swarms_at_public_addresses_are_audited() -> None:
    for peers in (PUBLIC, [PUBLIC], [HERE, PUBLIC]):
        assert audit_rate(None, peers) == SPOT_RATE


def test_embedded_and_private_swarms_are_not_unless_it_is_asked_for() -> None:
    invitation = Invitation(bytes(32), bytes(8), bytes(16), Role.NOTEBOOK, 1, "", (PUBLIC,))
    for peers in (None, [HERE], str(invitation), [str(invitation)]):
        assert audit_rate(None, peers) == 0
        assert audit_rate("spot", peers) == SPOT_RATE
