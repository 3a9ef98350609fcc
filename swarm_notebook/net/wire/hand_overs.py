"""What a server signs of what it hands over to the next one.

A stream is authentic to its two ends alone. Whoever is pushed to knows who has pushed, and cannot
show it to the notebook; so, if the two say different things of a hand-over, either could be lying.
Therefore a push comes with a signature by the key behind the sender's peer id, over the notebook,
its session and the step that it is for, and over a hash of the tensor. (Over the notebook, as the
receiver could ask the sender for other pushes to itself, in the same names.) The receiver computes
with nothing that is not signed so, and keeps what it has checked for a while (`Signed`): asked by
the notebook, it shows by that what it was given. So one of the two is wrong for sure:

- the receiver shows a signature for another tensor than the sender has told of: the sender;
- it shows one for the same, though its print (`prints`) was another one, or shows none: itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from swarm_notebook.net.identity import Identity, is_signature
from swarm_notebook.net.wire.message import PackedTensor

# What precedes all that is signed: nothing else that this key ever signs begins so.
_DOMAIN = b"swarm-notebook hand-over:"
# A prompt of 2,048 tokens has 16 MiB at the width of an 8B model, and one thread takes 10 to 25 ms
# for it: pieces are hashed at once.
_PIECE_BYTES = 1 << 20
# Of RSA with 4,096 bits; Ed25519 has 64.
MAX_SIGNATURE_BYTES = 512


class PushedStep(NamedTuple):
    """What a push is for.

    Attributes:
        client: the peer that asked for it.
        session_id, step_id: of the receiver.
    """

    client: str
    session_id: str
    step_id: str


class Claim(NamedTuple):
    """Who has pushed something, and the signature that came along; nothing is checked yet.

    Attributes:
        sender: the peer, of which the stream is certain.
        key: as `Identity.stated_key`.
    """

    sender: str
    signature: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Signed:
    """The hash of a tensor that was handed over, and its sender's signature."""

    digest: bytes
    signature: bytes
    key: bytes

    def is_by(self, peer: str, step: PushedStep) -> bool:
        """Whether this peer has handed over such a tensor for this step."""
        return is_signature(peer, self.key, _statement(step, self.digest), self.signature)


def digest(tensor: PackedTensor) -> bytes:
    """A hash of a tensor as it travels: SHA-256 of its header's and its pieces' SHA-256."""
    whole = memoryview(tensor.buffer)
    pieces = [whole[at : at + _PIECE_BYTES] for at in range(0, len(whole), _PIECE_BYTES)]
    found = hashlib.sha256(_sha256(tensor.header))
    for one in _threads().map(_sha256, pieces) if len(pieces) > 1 else map(_sha256, pieces):
        found.update(one)
    return found.digest()


def _sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="hash")


def sign(identity: Identity, step: PushedStep, tensor: PackedTensor) -> Signed:
    """What goes along with a tensor that is pushed."""
    hashed = digest(tensor)
    signature = identity.sign(_statement(step, hashed))
    return Signed(hashed, signature, identity.stated_key)


def checked(claim: Claim, step: PushedStep, tensor: PackedTensor) -> Signed | None:
    """What is kept of a tensor that was pushed; None if its sender has not signed it."""
    found = Signed(digest(tensor), claim.signature, claim.key)
    return found if found.is_by(claim.sender, step) else None


def _statement(step: PushedStep, hashed: bytes) -> bytes:
    return _DOMAIN + json.dumps([*step, hashed.hex()]).encode()
