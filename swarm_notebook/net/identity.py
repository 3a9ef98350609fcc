"""Who a peer is: the private key behind its id, and what is signed with it.

A libp2p peer id is made of its public key: the key itself where that is short (Ed25519), else its
SHA-256 (RSA), both as a multihash of libp2p's protobuf of the key [1]. So a signature whose public
key gives the id can come from that peer only, whoever hands it on. New identities are Ed25519:
their ids hold the key, and a signature has 64 bytes. Files with RSA keys, as hivemind's own
programs write them, serve as well.

[1] https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeGuard

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_private_key,
    load_der_public_key,
)
from google.protobuf.message import DecodeError
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2

from swarm_notebook.errors import AddressError

# Multihash codes; a longer public key than this is hashed (the specification's number).
_IDENTITY, _SHA256, _INLINE_BYTES = 0x00, 0x12, 42
_ED25519_BYTES = 32
# What a public key may take: RSA with 4,096 bits has 560. Longer ones cost seconds to check.
MAX_KEY_BYTES, MAX_RSA_BITS = 600, 4096


class Identity:
    """A private key that signs what its peer says.

    Attributes:
        peer_id: the peer that it makes.
        file: what the network daemon reads as its identity (libp2p's protobuf of the key).
        stated_key: the public key where the peer id does not hold it, else nothing.
    """

    def __init__(self, file: bytes):
        """Take the content of an identity file.

        Raises:
            ValueError: it holds no RSA or Ed25519 key.
        """
        try:
            message = crypto_pb2.PrivateKey.FromString(file)
        except DecodeError as error:
            raise ValueError(f"not a libp2p private key ({error})") from None
        self.file = file
        self._key: Ed25519PrivateKey | rsa.RSAPrivateKey
        if message.key_type == crypto_pb2.KeyType.Ed25519:
            self._key = Ed25519PrivateKey.from_private_bytes(message.data[:_ED25519_BYTES])
            public = self._key.public_key().public_bytes_raw()
        else:
            loaded = load_der_private_key(message.data, password=None)
            if not isinstance(loaded, rsa.RSAPrivateKey):
                raise ValueError("a private key that is neither RSA nor Ed25519")
            self._key = loaded
            public = self._key.public_key().public_bytes(
                Encoding.DER, PublicFormat.SubjectPublicKeyInfo
            )
        packed = crypto_pb2.PublicKey(key_type=message.key_type, data=public).SerializeToString()
        self.peer_id: PeerID = _peer_of(packed)
        self.stated_key = b"" if len(packed) <= _INLINE_BYTES else packed

    @classmethod
    def new(cls) -> Self:
        key = Ed25519PrivateKey.generate()
        data = key.private_bytes_raw() + key.public_key().public_bytes_raw()
        message = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.Ed25519, data=data)
        return cls(message.SerializeToString())

    @classmethod
    def read(cls, path: Path) -> Self:
        """The identity in a file.

        Raises:
            AddressError: the file holds none, or cannot be read.
        """
        try:
            return cls(path.read_bytes())
        except (OSError, ValueError) as error:
            raise AddressError(
                f"identity {path}: {error}; give the file that an earlier server wrote, or the "
                "name of one that is not there yet"
            ) from None

    def write(self, path: Path) -> None:
        """Write a new identity file, which its owner alone can read.

        Raises:
            AddressError: the file cannot be written, or is there already.
        """
        try:
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
            with os.fdopen(made, "wb") as file:
                file.write(self.file)
        except OSError as error:
            raise AddressError(
                f"identity {path} cannot be written: {error}; give a file in a folder that is "
                "there and has room"
            ) from None

    def sign(self, data: bytes) -> bytes:
        """The signature of some bytes, in libp2p's form for this kind of key."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def is_peer_id(found: object) -> TypeGuard[str]:
    """Whether something is the base58 id of a peer."""
    try:
        return isinstance(found, str) and bool(PeerID.from_base58(found))
    except ValueError:
        return False


def is_signature(peer: str, stated_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether a peer has signed these bytes.

    Args:
        peer: its base58 id.
        stated_key: the public key that came along, as `Identity.stated_key`.
    """
    try:
        key = _public_key(PeerID.from_base58(peer), stated_key)
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError, TypeError, DecodeError):
        return False
    return True


def _public_key(peer: PeerID, stated_key: bytes) -> Ed25519PublicKey | rsa.RSAPublicKey:
    """The public key of a peer.

    Raises:
        ValueError, DecodeError: the id does not hold it, and what was stated is not it.
    """
    known = peer.to_bytes()
    packed = known[2:] if known[:1] == bytes([_IDENTITY]) else stated_key
    if len(packed) > MAX_KEY_BYTES or _peer_of(packed) != peer:
        raise ValueError("another peer's key")
    message = crypto_pb2.PublicKey.FromString(packed)
    if message.key_type == crypto_pb2.KeyType.Ed25519:
        return Ed25519PublicKey.from_public_bytes(message.data)
    key: Any = load_der_public_key(message.data)
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size > MAX_RSA_BITS:
        raise ValueError("no RSA key of a usual size")
    return key


def _peer_of(packed: bytes) -> PeerID:
    """The id of the peer with a public key, which is libp2p's protobuf of it."""
    if len(packed) <= _INLINE_BYTES:
        return PeerID(bytes([_IDENTITY, len(packed)]) + packed)
    digest = hashlib.sha256(packed).digest()
    return PeerID(bytes([_SHA256, len(digest)]) + digest)


@contextlib.contextmanager
def identity_file(path: Path | None) -> Iterator[tuple[Identity, Path, bool]]:
    """An identity, the file of it (without a wanted one, gone afterwards), and if it was there."""
    if path is not None:
        lasting = path.exists()
        if not lasting:
            Identity.new().write(path)
        yield Identity.read(path), path, lasting
        return
    with tempfile.TemporaryDirectory() as folder:
        new = Identity.new()
        new.write(Path(folder, "identity"))
        yield new, Path(folder, "identity"), False
