"""What a server signs of what it hands over."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hivemind.p2p import PeerID

from swarm_notebook.net.identity import Identity
from swarm_notebook.net.wire.hand_overs import Claim, PushedStep, checked, digest, sign
from swarm_notebook.net.wire.message import PackedTensor

TENSOR = PackedTensor(b"abcd", (1, 1, 2), "float16")
STEP = PushedStep("notebook", "session", "step")
SENDER, OTHER = Identity.new(), Identity.new()


def name(of: Identity) -> str:
    peer: PeerID = of.peer_id
    return peer.to_base58()


def test_what_a_server_has_signed_is_known_by_its_peer_id() -> None:
    signed = sign(SENDER, STEP, TENSOR)
    claim = Claim(name(SENDER), signed.signature, signed.key)
    assert checked(claim, STEP, TENSOR) == signed
    assert signed.digest == digest(TENSOR)
    assert signed.is_by(name(SENDER), STEP)
    assert not signed.is_by(name(OTHER), STEP)
    assert checked(claim._replace(sender=name(OTHER)), STEP, TENSOR) is None
    assert checked(claim._replace(signature=b""), STEP, TENSOR) is None


@pytest.mark.parametrize("what", PushedStep._fields)
def test_it_holds_for_nothing_else(what: str) -> None:
    """Not for what another notebook has asked for either, in the same names."""
    signed = sign(SENDER, STEP, TENSOR)
    assert not signed.is_by(name(SENDER), STEP._replace(**{what: "another"}))
    assert not replace(signed, digest=bytes(32)).is_by(name(SENDER), STEP)


def test_large_tensors_are_hashed_in_pieces() -> None:
    data = random.Random(0).randbytes(2_500_000)
    known = digest(PackedTensor(data))
    assert known == digest(PackedTensor(memoryview(data)))
    for place in (0, 1 << 20, len(data) - 1):
        other = bytearray(data)
        other[place] ^= 1
        assert digest(PackedTensor(bytes(other))) != known
    assert digest(PackedTensor(data[1 << 20 :] + data[: 1 << 20])) != known


def test_bytes_in_another_dtype_or_shape_are_another_tensor() -> None:
    others = (
        PackedTensor(b"abce", (1, 1, 2), "float16"),
        PackedTensor(b"abcd", (1, 1, 2), "bfloat16"),
        PackedTensor(b"abcd", (1, 2, 1), "float16"),
        PackedTensor(b"abcd", (1, 1, 2), "float16", 1),
    )
    assert len({digest(one) for one in (TENSOR, *others)}) == 5
