"""Keys, certificates and invitations of private swarms: who is believed, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm_notebook.errors import InvitationError, NotAMember
from swarm_notebook.net.identity import Identity
from swarm_notebook.net.membership import authority as authorities
from swarm_notebook.net.membership import certificate as certificates
from swarm_notebook.net.membership.authority import MEMBER_SECONDS, Authority
from swarm_notebook.net.membership.certificate import (
    SHOWN_BYTES,
    Certificate,
    Credentials,
    Membership,
    Role,
    read_revocations,
)
from swarm_notebook.net.membership.invitation import (
    PREFIX,
    Invitation,
    Redemption,
    Ruling,
    is_invitation,
    unpack_answer,
)

PEER = Identity.new().peer_id
ADDRESS = f"/ip4/192.0.2.7/tcp/31330/p2p/{PEER.to_base58()}"


@pytest.fixture
def swarm(tmp_path: Path) -> Authority:
    """A swarm with one server."""
    made = Authority(tmp_path / "swarm")
    made.runs(PEER.to_base58(), [ADDRESS], "org/model")
    return made


def redeem(swarm: Authority, invitation: Invitation, key: Ed25519PrivateKey) -> tuple[int, bytes]:
    request = Redemption.of(invitation, key.public_key().public_bytes_raw()).pack()
    answer = unpack_answer(swarm.redeem(request))
    assert answer is not None
    return answer[0], answer[2]


def joined(swarm: Authority, role: str = "notebook") -> Credentials:
    key = Ed25519PrivateKey.generate()
    verdict, certificate = redeem(swarm, swarm.invite(role), key)
    assert verdict == Ruling.GRANTED
    return Credentials(swarm.swarm, key, certificate)


def refused(check: Callable[[], object], word: str) -> None:
    with pytest.raises(NotAMember, match=word):
        check()


def test_an_invitation_survives_copying(swarm: Authority) -> None:
    invitation = swarm.invite("server")
    text = str(invitation)
    assert is_invitation(text)
    assert Invitation.read(f"  {text[:60]}\n  {text[60:]}\n") == invitation
    assert (invitation.model, invitation.addresses) == ("org/model", (ADDRESS,))
    assert invitation.secret.hex() not in repr(invitation)


def test_an_invitation_that_was_cut_or_changed_is_named_as_such(swarm: Authority) -> None:
    text = str(swarm.invite())
    for length in range(len(PREFIX) + 5, len(text)):
        with pytest.raises(InvitationError, match="incomplete"):
            Invitation.read(text[:length])
    for at in range(len(PREFIX) + 3, len(text)):
        other = "A" if text[at] != "A" else "B"
        with pytest.raises(InvitationError):
            Invitation.read(text[:at] + other + text[at + 1 :])
    # Of its last character not every bit counts.
    for other in set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") - {
        text[-1]
    }:
        with pytest.raises(InvitationError):
            Invitation.read(text[:-1] + other)
    for rubbish in ("", "swarm1", "swarm1!", "hello", "x" * 10**7, PREFIX + "A" * 3000):
        with pytest.raises(InvitationError):
            Invitation.read(rubbish)


def test_members_are_let_in_by_their_role(swarm: Authority) -> None:
    keeper = Membership(swarm.owner(), PEER)
    notebook, server = Identity.new().peer_id, Identity.new().peer_id
    shown = joined(swarm).shown_by(notebook)
    assert len(shown) == SHOWN_BYTES
    keeper.check(notebook.to_base58(), shown)
    refused(lambda: keeper.check(notebook.to_base58(), shown, Role.SERVER), "role")
    keeper.check(server.to_base58(), joined(swarm, "server").shown_by(server), Role.SERVER)
    keeper.check(PEER.to_base58(), keeper.shown, Role.SERVER)


def test_strangers_are_not(swarm: Authority, tmp_path: Path) -> None:
    keeper = Membership(swarm.owner(), PEER)
    member, stranger = Identity.new().peer_id, Identity.new().peer_id
    shown = joined(swarm).shown_by(member)
    other = Authority(tmp_path / "other").owner()
    for nothing in (None, b"", "text", 7):
        with pytest.raises(NotAMember, match="invitation"):
            keeper.check(stranger.to_base58(), nothing)
    for rubbish in (b"x", b"\0" * SHOWN_BYTES, b"\xff" * 10**6, shown[:-1] + b"\0"):
        assert not keeper.holds(stranger.to_base58(), rubbish)
    refused(lambda: keeper.check(stranger.to_base58(), shown), "another peer")
    refused(lambda: keeper.check(stranger.to_base58(), other.shown_by(stranger)), "another swarm")
    raised = bytes([1, Role.SERVER]) + shown[2:]
    refused(lambda: keeper.check(member.to_base58(), raised), "changed")


def test_a_membership_ends(swarm: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, credentials = Membership(swarm.owner(), PEER), joined(swarm)
    peer = Identity.new().peer_id
    itself = Membership(credentials, peer)
    certificate = keeper.check(peer.to_base58(), itself.shown)
    ended: list[str] = []
    with keeper.holding(certificate, lambda: ended.append("late")):
        keeper.end_strangers()
        assert not ended
        now = time.time()
        monkeypatch.setattr(certificates.time, "time", lambda: now + MEMBER_SECONDS + 3600)
        refused(lambda: keeper.check(peer.to_base58(), itself.shown), "expired")
        refused(itself.check_own, "expired")
        keeper.end_strangers()
    assert ended == ["late"]


def test_who_is_revoked_is_out(swarm: Authority, tmp_path: Path) -> None:
    keeper, peer = Membership(swarm.owner(), PEER), Identity.new().peer_id
    itself = Membership(joined(swarm), peer)
    stays = joined(swarm).shown_by(peer)
    certificate = keeper.check(peer.to_base58(), itself.shown)
    ended: list[str] = []
    with keeper.holding(certificate, lambda: ended.append("revoked")):
        assert keeper.learn(swarm.revocations())
        assert not ended
        (gone,) = swarm.revoke(swarm.members()[0].name)
        assert gone.key == certificate.member
        assert keeper.learn(swarm.revocations())
    assert ended == ["revoked"]
    refused(lambda: keeper.check(peer.to_base58(), itself.shown), "revoked")
    keeper.check(peer.to_base58(), stays)
    assert itself.learn(keeper.revocations)
    refused(itself.check_own, "revoked")
    # Nobody takes that back with an older list, or one of their own.
    older = certificates.signed_revocations(swarm._key, 0, [])
    foreign = Authority(tmp_path / "other").revocations()
    for rubbish in (older, foreign, b"", b"\xff" * 9000, None, keeper.revocations[:-1] + b"\0"):
        assert not keeper.learn(rubbish)


def test_an_invitation_is_redeemed_as_often_as_it_says(swarm: Authority) -> None:
    invitation = swarm.invite(uses=2)
    first, second, third = (Ed25519PrivateKey.generate() for _ in range(3))
    granted = redeem(swarm, invitation, first)
    assert granted[0] == Ruling.GRANTED
    assert redeem(swarm, invitation, first) == granted
    assert redeem(swarm, invitation, second)[0] == Ruling.GRANTED
    assert redeem(swarm, invitation, third)[0] == Ruling.SPENT
    assert len(swarm.members()) == 2


def test_what_is_not_redeemed(swarm: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    key = Ed25519PrivateKey.generate()
    invitation, leaked = swarm.invite(), swarm.invite()
    forged = Invitation(**{**invitation.__dict__, "secret": b"\0" * 16})
    unknown = Invitation(**{**invitation.__dict__, "id": b"\0" * 8})
    for wrong in (forged, unknown):
        assert redeem(swarm, wrong, key)[0] == Ruling.UNKNOWN
    for rubbish in (b"", b"\1" * 10**6, b"\2" * 73):
        answer = unpack_answer(swarm.redeem(rubbish))
        assert answer is not None
        assert answer[0] == Ruling.UNKNOWN
    swarm.revoke(str(leaked))
    assert redeem(swarm, leaked, key)[0] == Ruling.REVOKED
    now = time.time()
    monkeypatch.setattr(authorities.time, "time", lambda: now + 8 * 86400)
    assert redeem(swarm, invitation, key)[0] == Ruling.EXPIRED
    assert not swarm.members()


def test_who_has_used_an_invitation_that_is_revoked_is_out(swarm: Authority) -> None:
    invitation = swarm.invite(uses=3)
    for _ in range(2):
        redeem(swarm, invitation, Ed25519PrivateKey.generate())
    joined(swarm)
    assert len(swarm.revoke(invitation.id.hex())) == 2
    found = read_revocations(swarm.revocations(), swarm.swarm)
    assert found is not None
    assert found[0] == len(found[1]) == 2
    assert [member.revoked for member in swarm.members()].count(False) == 1
    for nobody in ("", "zz", "ffffffffffff"):
        with pytest.raises(InvitationError):
            swarm.revoke(nobody)


def test_keys_are_for_their_owner_alone(swarm: Authority) -> None:
    folder = swarm.folder
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    again = Authority(folder)
    assert again.swarm == swarm.swarm
    assert Certificate.read(again.owner().certificate, swarm.swarm).role == Role.SERVER


def test_without_a_server_nobody_is_invited(tmp_path: Path) -> None:
    with pytest.raises(InvitationError, match="no server"):
        Authority(tmp_path / "empty").invite()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "key").write_bytes(b"short")
    with pytest.raises(InvitationError, match="cannot be used"):
        Authority(tmp_path / "broken")
