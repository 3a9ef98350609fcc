"""Becoming a member: redeeming an invitation, and keeping what comes of it.

The key that is to be certified is written down before it is sent, so that an answer that was lost
costs no second use of the invitation, and the certificate with it as soon as it has come. Whoever
pastes the same invitation again on the same machine is a member already, and asks nobody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

from swarm_notebook.errors import ClocksDiffer, ConnectionFailed, InvitationError, NotAMember
from swarm_notebook.net.bootstrap import say_late
from swarm_notebook.net.membership import RENEW_SECONDS
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.membership.certificate import (
    CLOCK_SECONDS,
    Certificate,
    Credentials,
    short,
    when,
)
from swarm_notebook.net.membership.invitation import (
    Invitation,
    Redemption,
    Ruling,
    unpack_answer,
)
from swarm_notebook.net.wire.streams import TRANSPORT_ERRORS

logger: logging.Logger = logging.getLogger(__name__)

RPC_JOIN = "TransformerConnectionHandler.rpc_join"
# A dial and a round trip, on a machine that loads a model besides; and on one that does not, which
# is what each server gets, however little time is left.
REDEEM_SECONDS, LEAST_SECONDS = 10.0, 3.0

_REFUSED = {
    Ruling.UNKNOWN: "this swarm never issued it",
    Ruling.SPENT: "it has been used as often as it may be",
    Ruling.REVOKED: "it was revoked",
}


async def offer(p2p: P2P, authority: Authority) -> None:
    """From now on, redeem invitations at this peer."""
    # Threads are for everybody's work; a flood of strangers gets one of them.
    turn = asyncio.Lock()

    async def redeem(data: bytes, peer: PeerID) -> bytes:
        async with turn:
            answer = await asyncio.to_thread(authority.redeem, data)
        logger.info("peer %s has asked to join: %s", peer, "yes" if answer[0] == 0 else "no")
        return answer

    await p2p._client.add_unary_handler(RPC_JOIN, redeem)


async def join(
    p2p: P2P, invitation: Invitation, deadline: float, others: Collection[PeerID] = ()
) -> Credentials:
    """What makes this machine's user a member; asks a server unless that was done before.

    Args:
        deadline: by `time.monotonic`; until then those are asked again that are late.
        others: peers besides those of the invitation that may be of the swarm, as the local
            network tells; what they answer is the swarm's own word, or nothing.

    Raises:
        InvitationError: the servers refuse it.
        ConnectionFailed: no server that redeems it was reached.
        ClocksDiffer: this machine's clock and a server's differ by more than a minute.
    """
    key, certificate = await asyncio.to_thread(_read, invitation)
    if not certificate:
        return await _redeem(p2p, invitation, deadline, others, key)
    kept = Credentials(invitation.swarm, key, certificate)
    left = Certificate.read(certificate, invitation.swarm).expires - time.time()
    if left < RENEW_SECONDS:
        try:
            # Once: without it, too, the rest of the time is better spent on meeting the swarm.
            return await _redeem(p2p, invitation, time.monotonic(), others, key)
        except (ConnectionFailed, ClocksDiffer) as error:
            logger.info("the membership is not renewed: %s", error)
    return kept


async def _redeem(
    p2p: P2P,
    invitation: Invitation,
    deadline: float,
    others: Collection[PeerID],
    key: Ed25519PrivateKey,
) -> Credentials:
    """Ask one server after the other to be let in with a key."""
    request = Redemption.of(invitation, key.public_key().public_bytes_raw()).pack()
    failed: Exception | None = None
    invited = [PeerID.from_base58(Multiaddr(one)["p2p"]) for one in invitation.addresses]
    asked = deque(dict.fromkeys([*invited, *others]))
    while asked:
        peer = asked.popleft()
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(REDEEM_SECONDS, max(left, LEAST_SECONDS))):
                answer = await p2p._client.call_unary_handler(peer, RPC_JOIN, request)
        except TRANSPORT_ERRORS as error:
            failed = error
            # Who is late is not gone: it is asked again, after all others.
            left = deadline - time.monotonic()
            if isinstance(error, TimeoutError) and left > 0:
                say_late(left)
                asked.append(peer)
            continue
        try:
            certificate = _granted(answer, invitation, key.public_key().public_bytes_raw())
        except (InvitationError, ClocksDiffer) as error:
            if peer in invited:
                raise
            failed = error
            continue
        await asyncio.to_thread(_write, invitation, key, certificate)
        return Credentials(invitation.swarm, key, certificate)
    raise ConnectionFailed(
        f"no server that redeems invitations to the swarm {short(invitation.swarm)} answers at "
        f"{', '.join(invitation.addresses) or 'any address'}; it must run while others join "
        f"({failed or 'no address'})"
    )


def _granted(answer: bytes, invitation: Invitation, member: bytes) -> bytes:
    """The certificate in an answer, if the swarm itself has signed it."""
    found = unpack_answer(answer)
    if found is None:
        raise InvitationError(f"a server answered the invitation with {len(answer)} bytes")
    verdict, there, certificate = found
    ahead = time.time() - there
    if not abs(ahead) <= CLOCK_SECONDS:  # NaN, too
        raise ClocksDiffer.by(ahead, "the server that redeems invitations", CLOCK_SECONDS)
    if verdict == Ruling.GRANTED:
        try:
            granted = Certificate.read(certificate, invitation.swarm)
        except NotAMember as error:
            raise InvitationError(f"a server answered the invitation: {error}") from None
        if granted.member != member:
            raise InvitationError("a server answered with somebody else's certificate")
        return certificate
    why = _REFUSED.get(verdict, f"it expired at {when(invitation.expires)}")
    raise InvitationError(f"the invitation is refused: {why}; ask for a new one")


def _file(invitation: Invitation) -> Path:
    import platformdirs

    folder = Path(platformdirs.user_data_dir("swarm_notebook")) / "memberships"
    return folder / f"{invitation.swarm.hex()[:16]}-{invitation.id.hex()}.json"


def _read(invitation: Invitation) -> tuple[Ed25519PrivateKey, bytes]:
    """The key for an invitation, a new one at the first time, and its certificate if it has one."""
    path = _file(invitation)
    if path.exists():
        try:
            kept = json.loads(path.read_bytes())
            known = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(kept["key"]))
            certificate = bytes.fromhex(kept["certificate"])
            if certificate:
                Certificate.read(certificate, invitation.swarm)
        except (OSError, ValueError, KeyError, TypeError, NotAMember) as error:
            raise InvitationError(f"{path} is not readable ({error}); remove it") from None
        return known, certificate
    key = Ed25519PrivateKey.generate()
    _write(invitation, key, b"")
    return key, b""


def _write(invitation: Invitation, key: Ed25519PrivateKey, certificate: bytes) -> None:
    path = _file(invitation)
    text = json.dumps({"key": key.private_bytes_raw().hex(), "certificate": certificate.hex()})
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        fresh.replace(path)
    except OSError as error:
        raise InvitationError(f"the membership cannot be kept in {path}: {error}") from None
