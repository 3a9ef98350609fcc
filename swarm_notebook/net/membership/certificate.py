"""What a member of a private swarm shows, and who believes it.

Two signatures, in `SHOWN_BYTES` bytes: the swarm's key says that a member's key belongs to it, in
which role and until when; the member's key says that a peer is one of its processes. So one
invitation serves a person with several kernels and servers, and what is shown is of no use to
another peer: libp2p has made sure of the id of whoever shows it.

    certificate   version 1 | role 1 | expires 8 (Unix time) | member's key 32 | signature
    shown         certificate | the member's signature for the peer

Whom the swarm no longer wants is in a list that its key signs, with a number that grows:

    revocations   version 1 | number 8 | count 2 | count x 16 (the first bytes of members' keys) |
                  signature

All numbers are big-endian. Sizes are checked before anything is read.
"""

from __future__ import annotations

import contextlib
import enum
import struct
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hivemind.p2p import PeerID

from swarm_notebook.errors import NotAMember

KEY_BYTES, SIGNATURE_BYTES, NAME_BYTES = 32, 64, 16
_VERSION = 1
_BODY = struct.Struct(f">BBQ{KEY_BYTES}s")
CERTIFICATE_BYTES = _BODY.size + SIGNATURE_BYTES
SHOWN_BYTES = CERTIFICATE_BYTES + SIGNATURE_BYTES
_LIST = struct.Struct(">BQH")
# A record in the DHT holds 8 KiB. Members whose certificate has expired need no place any more.
MAX_REVOKED = 400
MAX_LIST_BYTES = _LIST.size + MAX_REVOKED * NAME_BYTES + SIGNATURE_BYTES
# What precedes all that is signed, so that no signature can be taken for another one.
_MEMBER, _PEER, _REVOKED = (
    b"swarm_notebook member\0",
    b"swarm_notebook peer\0",
    b"swarm_notebook revoked\0",
)
# What was found right is checked once: a notebook opens a stream per server and session.
_KNOWN_MOST = 4096
# Clocks may differ by a minute (`net.p2p.fixes.MAX_CLOCK_SECONDS`), and nobody is shut out by it.
CLOCK_SECONDS = 60.0


class Role(enum.IntEnum):
    """What a member may do; a server may do all that a notebook may."""

    NOTEBOOK = 1
    SERVER = 2

    @classmethod
    def named(cls, name: str) -> Role:
        """The role of a name.

        Raises:
            ValueError: there is none of it.
        """
        if name not in ("notebook", "server"):
            raise ValueError(f"role: {name!r}, expected 'notebook' or 'server'")
        return cls[name.upper()]

    @property
    def label(self) -> str:
        return self.name.lower()


def short(key: bytes) -> str:
    """How a swarm or a member is called in words: the first bytes of its key."""
    return key[:4].hex()


def when(seconds: float) -> str:
    """A moment of Unix time, in words."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "a time that no calendar has"


@dataclass(frozen=True)
class Certificate:
    """What the swarm's key has said of a member's.

    Attributes:
        expires: seconds of Unix time.
        member: the member's public key.
    """

    role: Role
    expires: int
    member: bytes

    @property
    def name(self) -> bytes:
        """By which it is revoked."""
        return self.member[:NAME_BYTES]

    def signed(self, swarm: Ed25519PrivateKey) -> bytes:
        """`CERTIFICATE_BYTES` bytes, by the swarm's key."""
        body = _BODY.pack(_VERSION, self.role, self.expires, self.member)
        return body + swarm.sign(_MEMBER + swarm.public_key().public_bytes_raw() + body)

    @classmethod
    def read(cls, data: bytes, swarm: bytes) -> Certificate:
        """The certificate in some bytes, which may come from anybody.

        Args:
            swarm: the public key of the swarm that is to have signed it.

        Raises:
            NotAMember: it has not, or this is no certificate.
        """
        if len(data) != CERTIFICATE_BYTES:
            raise NotAMember(f"not a certificate: {len(data)} bytes, expected {CERTIFICATE_BYTES}")
        body = data[: _BODY.size]
        version, role, expires, member = _BODY.unpack(body)
        right = _is_signed(swarm, _MEMBER + swarm + body, data[_BODY.size :])
        if not right or version != _VERSION or role not in Role.__members__.values():
            raise NotAMember("the certificate belongs to another swarm, or was changed")
        return cls(Role(role), expires, member)


@dataclass(frozen=True)
class Credentials:
    """What makes somebody a member: a key of their own, and what the swarm says of it.

    Attributes:
        swarm: the swarm's public key.
        key: the member's private key.
        certificate: `CERTIFICATE_BYTES` bytes.
    """

    swarm: bytes
    key: Ed25519PrivateKey
    certificate: bytes

    def shown_by(self, peer: PeerID) -> bytes:
        """What a peer of this member shows: `SHOWN_BYTES` bytes."""
        member = self.key.public_key().public_bytes_raw()
        return self.certificate + self.key.sign(_PEER + self.swarm + member + peer.to_bytes())


class Membership:
    """One peer's place in a private swarm: what it shows to others, and whom it believes.

    Belongs to the loop of its node, but for `holds`, which any thread may call.

    Args:
        credentials: of the member whose peer it is.
        peer: this peer.

    Attributes:
        swarm: the swarm's public key.
        role: what this peer may do.
        expires: until when, in seconds of Unix time.
        shown: what it shows wherever it asks for something.
        revocations: the newest list that was learnt, as it came; empty if there was none.

    Raises:
        NotAMember: the credentials are not this swarm's.
    """

    swarm: bytes
    role: Role
    expires: int
    shown: bytes
    revocations: bytes

    def __init__(self, credentials: Credentials, peer: PeerID) -> None:
        own = Certificate.read(credentials.certificate, credentials.swarm)
        self.swarm, self.role, self.expires = credentials.swarm, own.role, own.expires
        self.shown = credentials.shown_by(peer)
        self.revocations = b""
        self._own, self._number, self._revoked = own, -1, frozenset[bytes]()
        self._streams: dict[Callable[[], None], Certificate] = {}

    @property
    def name(self) -> str:
        """The swarm's, in words."""
        return short(self.swarm)

    @property
    def revocations_key(self) -> str:
        """Under which key of the DHT the list of those who are revoked stands."""
        return f"_swarm_{self.swarm.hex()}"

    def check(self, peer: str, shown: object, role: Role = Role.NOTEBOOK) -> Certificate:
        """Let a peer in, or say why not.

        Args:
            peer: the base58 id of who has shown it, of which the network is certain.
            shown: what it has shown, whatever that is.
            role: what it wants to do.

        Raises:
            NotAMember: it may not.
        """
        if not isinstance(shown, bytes) or not shown:
            raise NotAMember(
                "this swarm is private; ask whoever started it for an invitation "
                "(`swarm-notebook invite`), and connect with that"
            )
        if len(shown) != SHOWN_BYTES:
            raise NotAMember(f"not a certificate: {len(shown)} bytes")
        found = _shown_certificate(self.swarm, peer, shown)
        if found.expires < time.time() - CLOCK_SECONDS:
            raise NotAMember(
                f"the membership {short(found.member)} expired at {when(found.expires)}, and "
                f"it is {when(time.time())} here; ask for a new invitation"
            )
        if found.name in self._revoked:
            raise NotAMember(f"the membership {short(found.member)} was revoked")
        if found.role < role:
            raise NotAMember(
                f"the membership {short(found.member)} is for a {found.role.label}, this needs one "
                f"for a {role.label}; ask for an invitation made with --role {role.label}"
            )
        return found

    def holds(self, peer: str, shown: object, role: Role = Role.NOTEBOOK) -> bool:
        """Whether `check` would let it in."""
        try:
            self.check(peer, shown, role)
        except NotAMember:
            return False
        return True

    def check_own(self) -> None:
        """Say so if this peer itself is no member any more.

        Raises:
            NotAMember: it is revoked, or its membership has expired.
        """
        if self._own.name in self._revoked:
            raise NotAMember(f"this membership of the swarm {self.name} was revoked")
        if self.expires < time.time():
            raise NotAMember(
                f"this membership of the swarm {self.name} expired at {when(self.expires)}; "
                "ask for a new invitation"
            )

    def learn(self, revocations: object) -> bool:
        """Take in a list of those who are revoked; whether it is a newer one.

        Streams of theirs end at once. What the swarm has not signed changes nothing.
        """
        found = read_revocations(revocations, self.swarm)
        if found is None or not isinstance(revocations, bytes) or found[0] <= self._number:
            return False
        self._number, self._revoked = found
        self.revocations = revocations
        self.end_strangers()
        return True

    def end_strangers(self) -> None:
        """End the streams of those who are members no more."""
        late = time.time() - CLOCK_SECONDS
        for end, its in list(self._streams.items()):
            if its.name in self._revoked or its.expires < late:
                end()

    @contextlib.contextmanager
    def holding(self, certificate: Certificate, end: Callable[[], None]) -> Iterator[None]:
        """A stream of a member is open; ``end`` is called when they are none any more."""
        self._streams[end] = certificate
        try:
            yield
        finally:
            self._streams.pop(end, None)


@lru_cache(maxsize=_KNOWN_MOST)
def _shown_certificate(swarm: bytes, peer: str, shown: bytes) -> Certificate:
    """What a peer has shown, if both signatures hold."""
    found = Certificate.read(shown[:CERTIFICATE_BYTES], swarm)
    data = _PEER + swarm + found.member + PeerID.from_base58(peer).to_bytes()
    if not _is_signed(found.member, data, shown[CERTIFICATE_BYTES:]):
        raise NotAMember("the certificate belongs to another peer")
    return found


def signed_revocations(swarm: Ed25519PrivateKey, number: int, members: Collection[bytes]) -> bytes:
    """The list of those who are revoked, by the swarm's key.

    Args:
        number: how many there ever were; a list with a larger one replaces others.
        members: their public keys, at most `MAX_REVOKED`.
    """
    names = sorted(member[:NAME_BYTES] for member in members)
    body = _LIST.pack(_VERSION, number, len(names)) + b"".join(names)
    return body + swarm.sign(_REVOKED + swarm.public_key().public_bytes_raw() + body)


def read_revocations(data: object, swarm: bytes) -> tuple[int, frozenset[bytes]] | None:
    """The number of a list and the names in it; None if the swarm has not signed it."""
    if not isinstance(data, bytes) or not _LIST.size < len(data) <= MAX_LIST_BYTES:
        return None
    version, number, count = _LIST.unpack_from(data)
    end = _LIST.size + count * NAME_BYTES
    if version != _VERSION or len(data) != end + SIGNATURE_BYTES:
        return None
    if not _is_signed(swarm, _REVOKED + swarm + data[:end], data[end:]):
        return None
    starts = range(_LIST.size, end, NAME_BYTES)
    return number, frozenset(data[start : start + NAME_BYTES] for start in starts)


def _is_signed(key: bytes, data: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
