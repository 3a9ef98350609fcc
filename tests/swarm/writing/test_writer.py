"""A text written in the background: the same tokens as in the foreground, and nothing twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from support.patience import PATIENCE, wait_until, within
from support.scene import Scene
from support.widgets import tokens_sent

from swarm_notebook.client.request import Request
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.writer import StepRoute
from swarm_notebook.errors import Busy, MissingBlocks
from swarm_notebook.writing import Sampling, Writer
from swarm_notebook.writing.writer import READ_AT_ONCE

NEW = 14
GREEDY = Sampling(max_new_tokens=NEW)
# Far more than any test waits for, within the context of the tiny model.
LONG = Sampling(max_new_tokens=200)


@pytest.fixture(params=["remote", "local"])
def model(request: pytest.FixtureRequest, tiny_scene: Scene) -> Any:
    return tiny_scene.remote if request.param == "remote" else tiny_scene.reference


@pytest.fixture(autouse=True)
def _no_end(tiny_scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes its end mark like any other token; it ends nothing here."""
    for model in (tiny_scene.remote, tiny_scene.reference):
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)


@contextmanager
def writing(model: Any, on_change: Callable[[Writer], None] | None = None) -> Iterator[Writer]:
    def changed() -> None:
        if on_change is not None:
            on_change(writer)

    writer = Writer(model, changed)
    try:
        yield writer
    finally:
        writer.close()


def at_token(count: int, do: Callable[[Writer], None]) -> Callable[[Writer], None]:
    """Does something once, when so many tokens are there."""
    done = []

    def changed(writer: Writer) -> None:
        if len(writer.draft.tokens) >= count and not done:
            done.append(True)
            do(writer)

    return changed


def finish(writer: Writer) -> list[int]:
    assert writer.wait(PATIENCE)
    assert writer.error is None
    return writer.draft.written


def plain(model: Any, ids: list[int], count: int = NEW, **options: Any) -> list[int]:
    """What ``generate`` writes in the foreground."""
    inputs = torch.tensor([ids])
    written = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        **{"do_sample": False, **options},
    )
    return written[0, len(ids) :].tolist()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens per request, over all requests to all servers."""
    return tokens_sent(monkeypatch)


def prompt(scene: Scene, seed: int = 0, length: int = 9) -> list[int]:
    return scene.ids(1, length, seed)[0].tolist()


def test_greedy_tokens_and_probabilities(model: Any, tiny_scene: Scene) -> None:
    ids = prompt(tiny_scene)
    with writing(model) as writer:
        writer.write(ids, GREEDY)
        written = finish(writer)
        tokens, timing = writer.draft.tokens, writer.timing
    assert written == plain(tiny_scene.reference, ids)
    with torch.no_grad():
        logits = tiny_scene.reference(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
    shares = torch.softmax(logits.float(), -1)
    for token, row in zip(tokens, shares, strict=True):
        values, best = row.topk(5)
        assert [one for one, _ in token.alternatives] == best.tolist()
        assert [p for _, p in token.alternatives] == pytest.approx(values.tolist(), abs=1e-4)
        assert token.probability == pytest.approx(float(row[token.id]), abs=1e-4)
    assert timing is not None
    assert (timing.tokens, timing.computed) == (len(written), len(ids))
    assert timing.to_first is not None
    assert timing.to_first > 0
    assert (writer.finished, timing.lost) == (False, 0)
    if model is tiny_scene.remote:
        assert sorted(timing.shares) == ["local-0", "local-1"]
        assert all(0 < share < 1 for share in timing.shares.values())
    else:
        assert not timing.shares


def test_sampling_is_that_of_generate_and_leaves_the_notebooks_alone(
    model: Any, tiny_scene: Scene
) -> None:
    ids = prompt(tiny_scene, 1)
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40}
    torch.manual_seed(7)
    expected = plain(tiny_scene.reference, ids, **options)
    state = torch.get_rng_state()
    sampling = Sampling(**options, max_new_tokens=NEW, seed=7)
    with writing(model) as writer:
        writer.write(ids, sampling)
        assert finish(writer) == expected
        assert expected != plain(tiny_scene.reference, ids)
        # Stopped and continued, the drawing goes on where it was.
        stop_at_5 = Sampling(**options, max_new_tokens=5, seed=7)
        writer.write(ids, stop_at_5)
        finish(writer)
        writer.resume(Sampling(**options, max_new_tokens=NEW - 5, seed=7))
        assert finish(writer) == expected
    assert torch.equal(state, torch.get_rng_state())


def test_stop_keeps_text_and_cache(tiny_scene: Scene, sent: list[int]) -> None:
    ids = prompt(tiny_scene, 2)
    with writing(tiny_scene.remote, at_token(6, Writer.stop)) as writer:
        writer.write(ids, LONG)
        written = finish(writer)
        assert len(written) in {6, 7}  # the one that was being computed comes
        assert written == plain(tiny_scene.reference, ids, len(written))
        sent.clear()
        writer.resume(Sampling(max_new_tokens=4))
        assert finish(writer) == plain(tiny_scene.reference, ids, len(written) + 4)
    assert sent == [1] * 4 * 2  # four tokens, two servers, nothing again


def test_a_branch_is_a_fresh_text_from_there_and_sends_what_is_new(
    model: Any, tiny_scene: Scene, sent: list[int]
) -> None:
    ids = prompt(tiny_scene, 3)
    with writing(model) as writer:
        writer.write(ids, GREEDY)
        written = finish(writer)
        token = next(one for one, _ in writer.draft.tokens[5].alternatives if one != written[5])
        probability = dict(writer.draft.tokens[5].alternatives)[token]
        sent.clear()
        writer.branch(5, [token], Sampling(max_new_tokens=4))
        branched = finish(writer)
        assert writer.draft.tokens[5].probability == probability
        assert writer.timing is not None
        assert writer.timing.computed == 1
    assert branched[:6] == [*written[:5], token]
    assert branched[6:] == plain(tiny_scene.reference, ids + branched[:6], 4)
    assert sent == ([1] * 4 * 2 if model is tiny_scene.remote else [])


def test_the_last_token_can_be_edited(tiny_scene: Scene, sent: list[int]) -> None:
    ids = prompt(tiny_scene, 4)
    with writing(tiny_scene.remote) as writer:
        writer.write(ids, Sampling(max_new_tokens=5))
        before = finish(writer)[:4]
        sent.clear()
        writer.edit(4, [77, 78])
        assert not sent
        writer.resume(Sampling(max_new_tokens=3))
        assert finish(writer) == [
            *before,
            77,
            78,
            *plain(tiny_scene.reference, [*ids, *before, 77, 78], 3),
        ]
        assert sent == [2, 2, 1, 1, 1, 1]
        with pytest.raises(IndexError, match="position 99"):
            writer.edit(99, [1])


def test_a_new_text_reuses_the_common_beginning(
    model: Any, tiny_scene: Scene, sent: list[int]
) -> None:
    ids = prompt(tiny_scene, 5, 20)
    other = [*ids[:15], *prompt(tiny_scene, 6, 4)]
    with writing(model) as writer:
        writer.write(ids, GREEDY)
        finish(writer)
        sent.clear()
        writer.write(other, Sampling(max_new_tokens=3))
        assert finish(writer) == plain(tiny_scene.reference, other, 3)
        assert writer.timing is not None
        assert writer.timing.computed == 4
    if model is tiny_scene.remote:
        assert sent == [4, 4, 1, 1, 1, 1]


def test_a_long_prompt_is_read_in_pieces_and_can_be_stopped(tiny_scene: Scene) -> None:
    """The tiny model has 256 positions: so a small piece stands for a large one."""
    ids = prompt(tiny_scene, 7, 100)
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("swarm_notebook.writing.writer.READ_AT_ONCE", READ_AT_ONCE // 8)

        def changed(writer: Writer) -> None:
            if writer.state == "reading":
                read.append(writer.read)
                if writer.read and len(read) == 2:
                    writer.stop()

        with writing(tiny_scene.remote, changed) as writer:
            writer.write(ids, GREEDY)
            assert not finish(writer)
            writer.resume(GREEDY)
            assert finish(writer) == plain(tiny_scene.reference, ids)
            assert writer.timing is not None
            assert writer.timing.computed == 100 - 32
    assert read == [0, 32, 0, 64, 96]


def test_the_notebook_generates_meanwhile(tiny_scene: Scene) -> None:
    """Two threads, one remote model: each has its own cache."""
    ids, other = prompt(tiny_scene, 8), prompt(tiny_scene, 9)
    begun = threading.Event()
    with writing(tiny_scene.remote, at_token(2, lambda _: begun.set())) as writer:
        writer.write(ids, Sampling(max_new_tokens=60))
        assert begun.wait(PATIENCE)
        with pytest.raises(Busy, match="still being written"):
            writer.resume(GREEDY)
        assert plain(tiny_scene.remote, other) == plain(tiny_scene.reference, other)
        assert finish(writer) == plain(tiny_scene.reference, ids, 60)


def test_a_second_stop_does_not_wait_for_the_token(tiny_scene: Scene) -> None:
    """A server that does not answer holds up nobody who has asked twice."""
    ids = prompt(tiny_scene, 10)
    hang = ExitStack()
    pause = at_token(3, lambda _: hang.enter_context(tiny_scene.local.hung()))
    with writing(tiny_scene.remote, pause) as writer:
        writer.write(ids, LONG)
        with hang:
            wait_until(lambda: len(writer.draft.tokens) >= 3)
            writer.stop()
            assert not writer.wait(0.3)
            writer.stop()
            with within(1.5):
                assert writer.wait(PATIENCE)
        assert writer.error is None
        count = len(writer.draft.tokens)
        writer.resume(GREEDY)
        assert finish(writer) == plain(tiny_scene.reference, ids, count + NEW)


def test_an_error_is_kept_with_the_text(tiny_scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(tiny_scene, 11)
    send = Hop.send
    lost: list[bool] = []

    async def failing(hop: Hop, request: Request, route: StepRoute) -> float:
        if lost:
            raise MissingBlocks("no server holds blocks 2:5")
        return await send(hop, request, route)

    monkeypatch.setattr(Hop, "send", failing)
    with writing(tiny_scene.remote, at_token(4, lambda _: lost.append(True))) as writer:
        writer.write(ids, GREEDY)
        assert writer.wait(PATIENCE)
        assert isinstance(writer.error, MissingBlocks)
        assert len(writer.draft.tokens) == 4
        lost.clear()
        monkeypatch.setattr(Hop, "send", send)
        writer.resume(Sampling(max_new_tokens=NEW - 4))
        assert finish(writer) == plain(tiny_scene.reference, ids)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}, {"seed": -3}],
)
def test_wrong_sampling_names_the_argument(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
