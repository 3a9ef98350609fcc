"""A server that lies costs a pause and its good name, never a wrong token or somebody's session."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.lying_server import NAME, Lie, LyingServer
from support.patience import PATIENCE, wait_until
from support.scene import TOLERANCE, AtToken, Scene, generate, scene

import swarm_notebook as sn
from swarm_notebook.client.servers import directory as directory_module
from swarm_notebook.errors import BadRequest, CacheFull, MissingBlocks, SessionLost
from swarm_notebook.net.wire import streams, tensors
from swarm_notebook.net.wire.message import PackedMessage, PackedTensor
from swarm_notebook.net.wire.streams import Stream
from swarm_notebook.net.wire.traffic import Traffic


def answer(*outputs: torch.Tensor) -> Lie:
    """Always the same tensors."""

    async def lie(stream: Stream, _request: PackedMessage) -> None:
        packed = [tensors.pack(output) for output in outputs]
        await stream.send(PackedMessage(tensors=packed))

    return lie


def write(data: bytes) -> Lie:
    """Bytes that are no frame."""

    async def lie(stream: Stream, _request: PackedMessage) -> None:
        stream._writer.write(data)

    return lie


def fail(error: Exception) -> Lie:
    async def lie(_stream: Stream, _request: PackedMessage) -> None:
        raise error

    return lie


async def claim_much(stream: Stream, _request: PackedMessage) -> None:
    """A tensor of a terabyte, according to its header."""
    tensor = PackedTensor(buffer=b"1234", size=(1 << 20, 1 << 20), dtype="float32")
    await stream.send(PackedMessage(tensors=[tensor]))


async def claim_narrow_rows(stream: Stream, _request: PackedMessage) -> None:
    """8-bit values in rows of one, which take a whole group each while they are multiplied out."""
    count = 200_000
    tensor = PackedTensor(
        buffer=bytes(3 * count), size=(count, 1), dtype="float64", compression=tensors.INT8
    )
    await stream.send(PackedMessage(tensors=[tensor]))


async def claim_no_tensor(stream: Stream, _request: PackedMessage) -> None:
    tensor = PackedTensor(size=(*[2**31 - 1] * 3, 0), dtype="float32")
    await stream.send(PackedMessage(tensors=[tensor]))


async def echo_nan(stream: Stream, request: PackedMessage) -> None:
    hidden = tensors.unpack(request.tensors[0])
    await answer(torch.full_like(hidden, torch.nan))(stream, request)


async def echo(stream: Stream, request: PackedMessage) -> None:
    """Of a pass that comes in several messages, the first has the hidden states."""
    if len(request.tensors[0].size) == 3:
        await answer(tensors.unpack(request.tensors[0]))(stream, request)


async def end(stream: Stream, _request: PackedMessage) -> None:
    await stream.send_end()


LIES: dict[str, Lie] = {
    "wrong shape": answer(torch.zeros(2, 9, 47)),
    "integers": answer(torch.zeros(2, 9, 48, dtype=torch.int64)),
    "too many tensors": answer(torch.zeros(2, 9, 48), torch.zeros(2, 9, 48)),
    "no tensors": answer(),
    "NaN": echo_nan,
    "a terabyte": claim_much,
    "narrow rows": claim_narrow_rows,
    "no tensor at all": claim_no_tensor,
    "no frame": write(b"\x07" * 9),
    "no message": write(b"\x00" + (3).to_bytes(8, "big") + b"\xff\xff\xff"),
    "an endless frame": write(b"\x00" + b"\x7f" * 8),
    "the end": end,
    "internal error": fail(RuntimeError("sorry")),
    "bad request": fail(BadRequest("your request is bad")),
    "cache full": fail(CacheFull("no room, ever")),
    "session lost": fail(SessionLost("lost again")),
}


@dataclass
class Stage:
    scene: Scene
    liar: LyingServer

    def tempt(self, lie: Lie) -> None:
        """Make the liar the first choice of the next request."""
        self.liar.lie = lie
        directory = self.scene.swarm.connection.directory
        directory.succeeded(self.liar.peer_id)

        def first() -> bool:
            self.scene.swarm.status()
            directory.rtt[self.liar.peer_id] = 0.0
            return self.scene.swarm.route().hops[0].name == NAME

        wait_until(first)  # on a busy machine it may miss a ping


@pytest.fixture(scope="module")
def stage(tiny_llama: Path) -> Iterator[Stage]:
    # A liar answers pings, which forgives it: not between an answer and what a test asks of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_module, "REFRESH_PERIOD", PATIENCE)
        with scene(tiny_llama, [(0, 5)]) as made:
            directory = made.swarm.connection.directory
            with LyingServer(made.local.initial_peers, directory.prefix, 5) as liar:
                yield Stage(made, liar)


@pytest.mark.parametrize("lie", LIES)
def test_generation_goes_on_elsewhere(stage: Stage, lie: str) -> None:
    stage.tempt(LIES[lie])
    ids = stage.scene.ids(2, 9)
    ours = generate(stage.scene.remote, ids)
    stage.scene.same(ours, generate(stage.scene.reference, ids))
    assert stage.scene.sessions[-1].failovers >= 1


@torch.no_grad()
@pytest.mark.parametrize(
    "lie",
    [
        "wrong shape",
        "NaN",
        "no frame",
        "a terabyte",
        "narrow rows",
        "no tensor at all",
        "internal error",
    ],
)
def test_a_forward_pass_goes_on_elsewhere(stage: Stage, lie: str) -> None:
    stage.tempt(LIES[lie])
    ids = stage.scene.ids(2, 9)
    ours, theirs = stage.scene.remote(ids).logits, stage.scene.reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_a_pass_that_one_server_calls_wrong_goes_on_elsewhere(stage: Stage) -> None:
    stage.tempt(LIES["bad request"])
    ids = stage.scene.ids(2, 9)
    ours, theirs = stage.scene.remote(ids).logits, stage.scene.reference(ids).logits
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    directory = stage.scene.swarm.connection.directory
    assert "your request is bad" in directory.avoided(stage.liar.peer_id)


async def nan_gradients(stream: Stream, _request: PackedMessage) -> None:
    await answer(torch.full((2, 9, 48), torch.nan))(stream, _request)


BACKWARD_LIES: dict[str, tuple[Lie, str]] = {
    "NaN": (nan_gradients, "gradients of the input with NaN"),
    "wrong shape": (LIES["wrong shape"], r"[2, 9, 47], expected [2, 9, 48]"),
    "narrow rows": (claim_narrow_rows, ", 1], expected [2, 9, 48]"),
    "bad request": (LIES["bad request"], "your request is bad"),
}


@pytest.mark.parametrize("lie", BACKWARD_LIES)
def test_a_backward_pass_goes_on_elsewhere(stage: Stage, lie: str) -> None:
    """The liar's forward passes are wrong, too, but they look right."""
    stage.tempt(echo)
    stage.liar.back, reason = BACKWARD_LIES[lie]
    model, ids = stage.scene.remote, stage.scene.ids(2, 9)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings).logits.square().sum()
    assert not stage.scene.swarm.connection.directory.avoided(stage.liar.peer_id)
    (grad,) = torch.autograd.grad(loss, embeddings)
    assert bool(grad.isfinite().all())
    assert bool(grad.any())
    assert reason in stage.scene.swarm.connection.directory.avoided(stage.liar.peer_id)


def test_the_liar_is_avoided_and_named(stage: Stage) -> None:
    stage.tempt(LIES["wrong shape"])
    generate(stage.scene.remote, stage.scene.ids(1, 9), max_new_tokens=1, min_new_tokens=1)
    directory = stage.scene.swarm.connection.directory
    assert "[2, 9, 47], expected [1, 1, 48]" in directory.avoided(stage.liar.peer_id)
    assert stage.scene.swarm.route().hops[0].name != NAME


def test_nobody_but_a_liar(stage: Stage) -> None:
    """Whoever has no other server gets an error in time, which says what was wrong."""
    directory = stage.scene.swarm.connection.directory
    stage.tempt(LIES["wrong shape"])
    patience, directory.patience = directory.patience, 1.0
    honest = stage.scene.local.servers[0]
    try:
        kill = AtToken({2: honest.kill})
        with pytest.raises(MissingBlocks, match=r"blocks 0:5.*liar.*expected"):
            generate(stage.scene.remote, stage.scene.ids(1, 9), stopping_criteria=[kill])
    finally:
        directory.patience = patience
        stage.scene.heal()


def test_liars_that_never_end_their_answers_cost_a_pause_together(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks have liars that begin answers as large as they may be and never end them.

    What the notebook holds for all of them stays within its budget, of which one gets half; the
    text goes on with the honest server, whose answers need room, too.
    """
    monkeypatch.setattr(streams, "STALLED_SECONDS", 2.0)
    monkeypatch.setattr(streams, "SLOWEST_BYTES", 1 << 20)
    rows, length, total = 8, 200, 2 << 20
    held: list[int] = []
    with scene(tiny_llama, [(0, 5)]) as made, ExitStack() as stack:
        directory = made.swarm.connection.directory
        budget = directory.node.answers = Traffic(total)

        async def begin(stream: Stream, _request: PackedMessage) -> None:
            packed = tensors.pack(torch.zeros(rows, length, 48))
            data = PackedMessage(tensors=[packed]).to_bytes()
            stream._writer.write(b"\x00" + len(data).to_bytes(8, "big") + data[: 1 << 17])
            for _ in range(100):
                held.append(budget.held)
                await asyncio.sleep(0.02)

        peers = made.local.initial_peers
        spans = [(0, 2), (2, 4), (4, 5)]
        liars = [LyingServer(peers, directory.prefix, end, start) for start, end in spans]
        for liar in liars:
            stack.enter_context(liar)
            liar.lie = begin

        def tempted() -> bool:
            made.swarm.status()
            directory.rtt.update({liar.peer_id: 0.0 for liar in liars})
            return [hop.name for hop in made.swarm.route().hops] == [NAME] * len(liars)

        wait_until(tempted)
        ids = made.ids(rows, length)
        ours = generate(made.remote, ids)
        assert total // 2 < max(held) <= total
        made.same(ours, generate(made.reference, ids))
        assert made.sessions[-1].failovers >= 2
        wait_until(lambda: budget.held == 0)


def test_a_ping_answered_with_rubbish_does_not_keep_others_from_connecting(
    stage: Stage, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.liar, "info", b"\xff\xff\xff")
    ids = stage.scene.ids(1, 9)
    with sn.connect(stage.scene.local.initial_peers, model=tiny_llama) as swarm:
        rows = {row.name: row.state for row in swarm.status().servers}
        assert rows[NAME] == "failing"
        stage.scene.same(generate(swarm.model, ids), generate(stage.scene.reference, ids))
