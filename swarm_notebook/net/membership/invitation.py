"""An invitation: all that somebody needs to join a private swarm, as one string.

    swarm1 + base64url of   length 2 | version 1 | swarm's key 32 | id 8 | secret 16 | role 1 |
                            expires 8 | model's length 2 | model | addresses 1, each: length 2,
                            multiaddr | checksum 4

Numbers are big-endian; the length is that of all of it, so that a copy that was cut is told from
one that was changed. The checksum, the first bytes of the SHA-256 of all before it, is for people's
copying and pasting: it keeps nobody from making a false invitation, which the secret does.

The secret never travels. Whoever redeems an invitation sends a public key of their own and an HMAC
of it under the secret (`Redemption`), so whoever listens, relays or pretends to be a server learns
nothing with which to become a member.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import struct
import time
from dataclasses import dataclass
from typing import Self

from hivemind.utils.multiaddr import Multiaddr

from swarm_notebook.errors import InvitationError
from swarm_notebook.net.membership.certificate import CERTIFICATE_BYTES, KEY_BYTES, Role, short
from swarm_notebook.texts import clean

PREFIX = "swarm1"
ID_BYTES, SECRET_BYTES, MAC_BYTES = 8, 16, 32
# Some ten addresses of two servers and a long name take less than half of it.
MAX_TEXT = 2048
MAX_ADDRESSES, MAX_NAME = 12, 200
_HEAD = struct.Struct(f">HB{KEY_BYTES}s{ID_BYTES}s{SECRET_BYTES}sBQ")
_VERSION, _CHECKSUM = 1, 4
_REQUEST = struct.Struct(f">B{ID_BYTES}s{KEY_BYTES}s{MAC_BYTES}s")
_ANSWER = struct.Struct(f">Bd{CERTIFICATE_BYTES}s")
REQUEST_BYTES, ANSWER_BYTES = _REQUEST.size, _ANSWER.size
_PURPOSE = b"swarm_notebook redemption\0"


@dataclass(frozen=True)
class Invitation:
    """Into a private swarm, in a role.

    Attributes:
        swarm: the swarm's public key.
        id: by which the swarm knows it.
        secret: shows that one has it.
        role: what those who redeem it may do.
        expires: until when it can be redeemed, in seconds of Unix time.
        model: what to name the model for `resolve`; empty: the one that the swarm serves.
        addresses: multiaddrs of servers that redeem it, with peer ids.
    """

    swarm: bytes
    id: bytes
    secret: bytes
    role: Role
    expires: int
    model: str
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        model = self.model.encode()
        parts = [struct.pack(">H", len(model)), model, bytes([len(self.addresses)])]
        for address in self.addresses:
            packed = Multiaddr(address).to_bytes()
            parts += [struct.pack(">H", len(packed)), packed]
        rest = b"".join(parts)
        length = _HEAD.size + len(rest) + _CHECKSUM
        head = _HEAD.pack(
            length, _VERSION, self.swarm, self.id, self.secret, self.role, self.expires
        )
        data = head + rest
        data += hashlib.sha256(data).digest()[:_CHECKSUM]
        return PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")

    def __repr__(self) -> str:
        """Without the secret: it shows up in tracebacks and logs."""
        return f"<Invitation {self.id.hex()} to the swarm {short(self.swarm)}: {self.role.label}>"

    @classmethod
    def read(cls, text: str) -> Self:
        """The invitation in a string that somebody has pasted, perhaps with line breaks in it.

        Raises:
            InvitationError: it is none, is cut, or was changed.
        """
        if len(text) > 2 * MAX_TEXT:
            raise InvitationError(f"{len(text)} characters are not an invitation; paste it alone")
        text = re.sub(r"\s", "", text)
        if not text.startswith(PREFIX) or len(text) > MAX_TEXT:
            raise InvitationError(f"not an invitation: it would begin with {PREFIX}")
        body = text[len(PREFIX) :]
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            # One character more than whole groups is what a cut may leave.
            cut = body[:-1] if re.fullmatch(r"[\w-]*", body, re.ASCII) else ""
            if not cut:
                raise InvitationError(
                    "the invitation has characters that cannot be in one; copy it again"
                ) from None
            data = base64.urlsafe_b64decode(cut + "=" * (-len(cut) % 4))
        found = cls._unpack(data)
        if base64.urlsafe_b64encode(data).decode().rstrip("=") != body:
            # The last character has bits that no byte needs.
            raise InvitationError("the invitation is damaged; copy it again")
        return found

    @classmethod
    def _unpack(cls, data: bytes) -> Self:
        whole = max(int.from_bytes(data[:2], "big"), _HEAD.size)
        if whole > MAX_TEXT:
            raise InvitationError("the invitation is damaged; copy it again")
        if len(data) < whole:
            raise InvitationError(
                f"the invitation is incomplete: {len(data)} of {whole} bytes; copy all of it"
            )
        if hashlib.sha256(data[:-_CHECKSUM]).digest()[:_CHECKSUM] != data[-_CHECKSUM:]:
            raise InvitationError("the invitation is damaged; copy it again")
        _, version, swarm, name, secret, role, expires = _HEAD.unpack_from(data)
        if version != _VERSION:
            raise InvitationError(
                f"the invitation has version {version}, only {_VERSION} can be read; update "
                "swarm-notebook"
            )
        try:
            model, addresses = _unpack_rest(data[_HEAD.size : -_CHECKSUM])
            return cls(swarm, name, secret, Role(role), expires, model, addresses)
        except Exception as error:  # hivemind's parser raises a different type per malformation
            raise InvitationError(
                f"the invitation is unreadable ({error}); copy it again"
            ) from None


def is_invitation(text: object) -> bool:
    """Whether something is meant to be an invitation, be it whole or not."""
    return isinstance(text, str) and text.strip().startswith(PREFIX)


def _unpack_rest(data: bytes) -> tuple[str, tuple[str, ...]]:
    size = int.from_bytes(data[:2], "big")
    if size > MAX_NAME or 2 + size >= len(data):
        raise ValueError("the model's name is too long")
    model, count, at = data[2 : 2 + size].decode(), data[2 + size], 3 + size
    if count > MAX_ADDRESSES:
        raise ValueError("too many addresses")
    addresses = []
    for _ in range(count):
        size = int.from_bytes(data[at : at + 2], "big")
        addresses.append(str(Multiaddr(data[at + 2 : at + 2 + size])))
        at += 2 + size
    if at != len(data):
        raise ValueError("its parts are not as long as it is")
    return clean(model), tuple(addresses)


@dataclass(frozen=True)
class Redemption:
    """A request to be certified, as it travels in `REQUEST_BYTES` bytes.

    Attributes:
        id: the invitation's.
        member: the public key that is to be certified.
        mac: HMAC-SHA256 of it under the invitation's secret.
    """

    id: bytes
    member: bytes
    mac: bytes

    @classmethod
    def of(cls, invitation: Invitation, member: bytes) -> Redemption:
        """The one by which a member redeems an invitation."""
        return cls(invitation.id, member, _mac(invitation.secret, invitation.swarm, member))

    def is_made_with(self, secret: bytes, swarm: bytes) -> bool:
        """Whether whoever made it has the invitation."""
        return hmac.compare_digest(self.mac, _mac(secret, swarm, self.member))

    def pack(self) -> bytes:
        return _REQUEST.pack(_VERSION, self.id, self.member, self.mac)

    @classmethod
    def unpack(cls, data: bytes) -> Redemption | None:
        """What came in; None if it is no redemption."""
        if len(data) != REQUEST_BYTES or data[0] != _VERSION:
            return None
        return cls(*_REQUEST.unpack(data)[1:])


class Ruling:
    """How a redemption ends, as a byte on the wire."""

    GRANTED, UNKNOWN, EXPIRED, SPENT, REVOKED = range(5)


def pack_answer(verdict: int, certificate: bytes = b"") -> bytes:
    """The answer to a redemption: the verdict, the time here, and the certificate if granted."""
    return _ANSWER.pack(verdict, time.time(), certificate.ljust(CERTIFICATE_BYTES, b"\0"))


def unpack_answer(data: bytes) -> tuple[int, float, bytes] | None:
    """The verdict, the server's time in seconds of Unix time, and the certificate, if readable."""
    return _ANSWER.unpack(data) if len(data) == ANSWER_BYTES else None


def _mac(secret: bytes, swarm: bytes, member: bytes) -> bytes:
    return hmac.digest(secret, _PURPOSE + swarm + member, "sha256")
