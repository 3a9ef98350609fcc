"""A private swarm on a real network: members get what anybody gets elsewhere, strangers nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2PDaemonError
from hivemind.utils import MSGPackSerializer, get_dht_time
from support.hosting import HostedServer, HostedSwarm
from support.patience import PATIENCE, wait_until
from support.raw_wire import RawClient
from support.scene import generate
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.client.servers.asking import ask
from swarm_notebook.errors import (
    ClocksDiffer,
    ConnectionFailed,
    InvitationError,
    NotAMember,
    RemoteError,
)
from swarm_notebook.net.membership import authority as authority_module
from swarm_notebook.net.membership import joining
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.membership.certificate import Certificate, Credentials, Role
from swarm_notebook.net.membership.invitation import Invitation, Redemption, unpack_answer
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.server.options import ServeOptions

HIDDEN = 48
STREAMS = (
    protocol.RPC_INFERENCE,
    protocol.RPC_FORWARD_STREAM,
    protocol.RPC_BACKWARD_STREAM,
)
EVERYTHING = {"info", "find", *STREAMS}
SERVERS_OWN = {"store", protocol.RPC_PUSH_STREAM}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the user's data folder is here."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def swarm(folder: Path, data: Path) -> Iterator[HostedSwarm]:
    """Two servers of a private swarm."""
    with HostedSwarm(folder, [(0, 2), (2, 5)], swarm=data / "swarm") as hosted:
        yield hosted


@pytest.fixture(scope="module")
def authority(swarm: HostedSwarm, data: Path) -> Authority:
    return Authority(data / "swarm")


def certified(authority: Authority, role: Role, seconds: float) -> Credentials:
    """Of a new member whose membership lasts for so long."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    certificate = Certificate(role, int(time.time() + seconds), public)
    return Credentials(authority.swarm, key, certificate.signed(authority._key))


def joined(authority: Authority, role: str = "notebook") -> Credentials:
    key = Ed25519PrivateKey.generate()
    request = Redemption.of(authority.invite(role), key.public_key().public_bytes_raw())
    answer = unpack_answer(authority.redeem(request.pack()))
    assert answer is not None
    return Credentials(authority.swarm, key, answer[2])


def got(client: RawClient, server: HostedServer) -> set[str]:
    """What a server gives to a client, of all that there is to get."""
    return client.run(_got(client, server))


async def _got(client: RawClient, server: HostedServer) -> set[str]:
    found, node = set(), client.node
    try:
        assert (await ask(node, server.peer_id))["end_block"]
        found.add("info")
    except NotAMember:
        pass
    for rpc in (*STREAMS, protocol.RPC_PUSH_STREAM):
        try:
            if await _answered(node, server, rpc):
                found.add(rpc)
        except NotAMember:
            pass
    dht, key = node.dht.protocol, DHTID.generate("tiny-llama.0")
    answer = await dht.call_find(server.peer, [key])
    if answer is not None:
        assert answer[key][0] is not None, "the records are there"
        found.add("find")
    value, soon = MSGPackSerializer.dumps("text"), get_dht_time() + 30
    own = node.peer_id.to_base58()
    if await dht.call_store(server.peer, [DHTID.generate("new")], [value], soon, [own]):
        found.add("store")
    return found


async def _answered(node: Any, server: HostedServer, rpc: str) -> bool:
    """Whether a server computes something (or takes a push)."""
    states, (start, end) = torch.randn(1, 3, HIDDEN), server.blocks
    slots = [states] * (2 if rpc == protocol.RPC_BACKWARD_STREAM else 1)
    metadata = protocol.pack_metadata({"session_id": "s", "step_id": "t"})
    stream = await node.open_stream(server.peer_id, rpc)
    try:
        for tensor in protocol.pack_slots(slots):
            uid = protocol.uid_chain("tiny-llama", start, end)
            await stream.send(PackedMessage(uid=uid, tensors=[tensor], metadata=metadata))
            if rpc in (protocol.RPC_PUSH_STREAM, protocol.RPC_INFERENCE):
                break
        if rpc != protocol.RPC_INFERENCE:
            await stream.send_end()
        async with asyncio.timeout(PATIENCE):
            answer = await stream.receive()
    except ConnectionError:
        return rpc == protocol.RPC_PUSH_STREAM  # it has ended without a word, as it should
    finally:
        stream.abort()
    return answer is None or bool(tensors.unpack(answer.tensors[0]).numel())


def test_members_get_what_their_role_gives(swarm: HostedSwarm, authority: Authority) -> None:
    for credentials, expected in (
        (joined(authority), EVERYTHING),
        (joined(authority, "server"), EVERYTHING | SERVERS_OWN),
    ):
        client = RawClient(swarm.initial_peers, credentials)
        try:
            assert got(client, swarm.servers[0]) == expected
        finally:
            client.close()


@pytest.mark.parametrize("kind", ["address", "expired", "another", "copied", "rubbish"])
def test_strangers_get_nothing(
    swarm: HostedSwarm, authority: Authority, tmp_path: Path, kind: str
) -> None:
    credentials = {
        "address": lambda: None,
        "expired": lambda: certified(authority, Role.SERVER, -3600),
        "another": Authority(tmp_path / "other").owner,
        "copied": authority.owner,
        "rubbish": authority.owner,
    }[kind]()
    client = RawClient(swarm.initial_peers, credentials)
    try:
        member = client.node.membership
        if kind == "copied":
            member.shown = authority.owner().shown_by(swarm.servers[1].peer)
        elif kind == "rubbish":
            member.shown = b"\xff" * 300_000
        assert got(client, swarm.servers[0]) == set()
        with pytest.raises(P2PDaemonError):
            client.run(client.forward(swarm.servers[0].peer, PackedMessage()))
        assert not swarm.servers[0]._server.busy
    finally:
        client.close()


def test_who_is_revoked_gets_nothing_more(swarm: HostedSwarm, authority: Authority) -> None:
    credentials = joined(authority, "server")
    client = RawClient(swarm.initial_peers, credentials)
    try:
        client.run(_open_session(client, swarm.servers[0]))
        public = credentials.key.public_key().public_bytes_raw()
        authority.revoke(public.hex())
        with pytest.raises((ConnectionError, RemoteError)):
            client.run(_await_end(client))
        for server in swarm.servers:
            wait_until(lambda server=server: not got(client, server), "the revocation")
    finally:
        client.close()


async def _open_session(client: RawClient, server: HostedServer) -> None:
    client.stream = await client.node.open_stream(server.peer_id, protocol.RPC_INFERENCE)


async def _await_end(client: RawClient) -> None:
    async with asyncio.timeout(PATIENCE):
        await client.stream.receive()


def test_an_invitation_is_all_it_takes(
    swarm: HostedSwarm, authority: Authority, folder: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    expected = generate(reference, ids)
    invitation = str(authority.invite())
    for _ in range(2):  # the second time it is spent, and of no need any more
        with sn.connect(invitation, model=folder) as remote:
            ours = generate(remote.model, ids)
            assert ours.sequences.tolist() == expected.sequences.tolist()
            for mine, local in zip(ours.logits, expected.logits, strict=True):
                torch.testing.assert_close(mine, local, atol=1e-4, rtol=0)
            again = remote.model(ids, use_cache=False).logits
            torch.testing.assert_close(again, reference(ids).logits, atol=1e-4, rtol=0)
    authority.revoke(invitation)
    wait_until(lambda: _is_refused(invitation, folder), "the revocation")


def _is_refused(invitation: str, folder: Path) -> bool:
    try:
        sn.connect(invitation, model=folder, timeout=5).disconnect()
    except NotAMember:
        return True
    return False


def test_a_notebook_with_an_address_is_told_what_it_lacks(swarm: HostedSwarm, folder: Path) -> None:
    for options in ({"model": folder}, {}):
        with pytest.raises(NotAMember, match="invitation"):
            sn.connect(swarm.initial_peers, timeout=5, **options)


def test_what_is_no_invitation_any_more(
    swarm: HostedSwarm, authority: Authority, folder: Path
) -> None:
    spent, (expired, late) = authority.invite(), (authority.invite(expires=1) for _ in range(2))
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    authority.redeem(Redemption.of(spent, other).pack())
    with pytest.raises(InvitationError, match="as often"):
        sn.connect(str(spent), model=folder)
    with pytest.raises(InvitationError, match="incomplete"):
        sn.connect(str(spent)[:-9], model=folder)
    wait_until(lambda: expired.expires < time.time() - 1)
    with pytest.raises(InvitationError, match="expired"):
        sn.connect(str(expired), model=folder)
    alone = Invitation(**{**late.__dict__, "addresses": ()})
    with pytest.raises((ConnectionFailed, InvitationError)):
        sn.connect(str(alone), model=folder)


def test_a_clock_that_is_an_hour_wrong_is_noticed(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation, key = authority.invite(), Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    answer = authority.redeem(Redemption.of(invitation, public).pack())
    assert joining._granted(answer, invitation, public)
    now = time.time()
    monkeypatch.setattr(joining.time, "time", lambda: now + 3600)
    with pytest.raises(ClocksDiffer, match=r"36\d\d s ahead"):
        joining._granted(answer, invitation, public)


def test_a_server_that_starts_again_is_found_by_old_invitations(
    data: Path, folder: Path, tmp_path: Path
) -> None:
    options = ServeOptions(folder, (0, 5), swarm=tmp_path)
    with HostedServer(options) as first:
        invitation = Authority(tmp_path).invite()
        with HostedServer(dataclasses.replace(options, blocks=(0, 2))) as beside:
            assert beside.peer_id != first.peer_id
    with HostedServer(options) as again:
        assert again.addresses == first.addresses
        sn.connect(str(invitation), model=folder).disconnect()


def test_a_membership_is_renewed_late_in_its_term(
    swarm: HostedSwarm, authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = authority.invite(expires=2)
    sn.connect(str(invitation), model=folder).disconnect()
    (before,) = (one for one in authority.members() if one.invitation == invitation.id)
    wait_until(lambda: invitation.expires < time.time() - 1)
    for module in (joining, authority_module):
        monkeypatch.setattr(module, "RENEW_SECONDS", 2 * authority_module.MEMBER_SECONDS)
    sn.connect(str(invitation), model=folder).disconnect()
    (after,) = (one for one in authority.members() if one.invitation == invitation.id)
    assert after.expires > before.expires
    authority.revoke(after.name)
    with pytest.raises(InvitationError, match="revoked"):
        sn.connect(str(invitation), model=folder)


def test_a_server_needs_the_role(swarm: HostedSwarm, authority: Authority, folder: Path) -> None:
    with (
        pytest.raises(NotAMember, match="role server"),
        HostedServer(ServeOptions(folder, (0, 2), [str(authority.invite())])),
    ):
        pass


def test_a_server_joins_and_two_swarms_do_not_mix(
    swarm: HostedSwarm, authority: Authority, folder: Path, tmp_path: Path
) -> None:
    ours = ServeOptions(folder, (0, 5), [str(authority.invite("server"))], name="friend")
    # Another swarm of the same model; its servers do not get into ours by an address.
    theirs = ServeOptions(folder, (0, 5), name="other", swarm=tmp_path)
    lost = ServeOptions(folder, (0, 5), swarm.initial_peers, swarm=tmp_path)
    with pytest.raises(NotAMember, match="private"), HostedServer(lost):
        pass
    with (
        HostedServer(ours) as friend,
        HostedServer(theirs) as other,
        sn.connect(str(authority.invite()), model=folder) as notebook,
        sn.connect(str(Authority(tmp_path).invite()), model=folder) as elsewhere,
    ):
        known = {span.peer for span in notebook.connection.directory.snapshot.spans}
        assert known == {friend.peer_id, *(server.peer_id for server in swarm.servers)}
        known = {span.peer for span in elsewhere.connection.directory.snapshot.spans}
        assert known == {other.peer_id}
