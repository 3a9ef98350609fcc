"""Calls that are replayed from a recording against sessions that run alone, for every family."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from glibc import allocated, needs_glibc
from tiny import FAMILIES, tiny_model
from torch import nn
from walks import Walk, prepared

from swarm_notebook.checkpoint.partial import load_blocks
from swarm_notebook.checkpoint.source import resolve
from swarm_notebook.server import graphs, joining, linear, recording
from swarm_notebook.server.graphs import SIZES, WANTED_STEPS, Graphs
from swarm_notebook.server.linear import Products
from swarm_notebook.server.recording import Subject
from swarm_notebook.server.requests import Step
from swarm_notebook.server.span import Span
from swarm_notebook.server.state import SessionState

HIDDEN = 48
# BLOOM and Falcon cannot be joined: there is nothing to record.
RECORDED = sorted(FAMILIES.keys() - {"bloom", "falcon"})


# Every other block has a window; elsewhere all are alike.
KINDS = {"gemma2": 2, "gemma3_text": 2, "gpt_oss": 2}


def loaded(folder: Path) -> Span:
    found = load_blocks(resolve(folder), 1, 4, dtype=torch.float32)
    span = Span(found.decoder, found.layers_name, 1)
    span.joins = joining.try_out(span, HIDDEN)
    return span


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Span:
    return loaded(tiny_model("llama", tmp_path_factory.mktemp("models")))


def everything(span: Span, sizes: Sequence[int] = SIZES) -> Graphs:
    """Recordings of all blocks."""
    made = Graphs(span, HIDDEN, Products.of(span.layers), lambda call: call())
    for size in sizes:
        for _ in range(WANTED_STEPS):
            made.find(1, 4, size)
    return made


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine recordings are used even if they seem to be slower."""
    monkeypatch.setattr(graphs, "_SLOWER", 0.0)


@pytest.mark.parametrize("family", RECORDED)
@pytest.mark.usefixtures("slowly")
def test_sessions_get_what_they_get_alone(family: str, tmp_path: Path) -> None:
    span = loaded(tiny_model(family, tmp_path))
    walks = [Walk(span, HIDDEN, seed, longest=6) for seed in range(4)]
    sessions = {walk: SessionState(span, context=None) for walk in walks}
    recorded = everything(span)
    assert all(recorded._recordings.values())
    assert len(recorded) == KINDS.get(family, 1) * len(SIZES)
    dice = random.Random(0)
    for _ in range(14):
        several: dict[Any, list[tuple[Walk, Any]]] = {}
        for walk in dice.sample(walks, dice.randint(1, 4)):
            turn = prepared(sessions[walk], walk.step())
            several.setdefault(turn[1].blocks, []).append((walk, turn))
        for members in several.values():
            span.graphs = recorded
            results = joining.run([turn for _, turn in members])
            span.graphs = None
            for (walk, turn), got in zip(members, results, strict=True):
                if isinstance(got, Exception):
                    raise got
                for mine, other in zip(got, walk.run(turn[1]), strict=True):
                    torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def steps(span: Span, count: int, tokens: int = 1) -> list[torch.Tensor]:
    """Outputs of some tokens of one session."""
    state, noise = SessionState(span, context=None), torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        hidden = torch.randn(1, tokens, HIDDEN, generator=noise)
        (output,) = joining.run([prepared(state, Step((1, 4), hidden))])
        assert not isinstance(output, Exception)
        found.append(output[0])
    return found


def test_a_number_of_tokens_that_comes_again_and_again_is_recorded(llama: Span) -> None:
    plain = steps(llama, WANTED_STEPS, tokens=3)
    wanted: list[Any] = []
    llama.graphs = Graphs(llama, HIDDEN, Products.of(llama.layers), wanted.append)
    steps(llama, WANTED_STEPS - 1, tokens=3)
    assert not wanted
    steps(llama, WANTED_STEPS, tokens=3)
    assert len(wanted) == 1
    # A little at a time; whoever still runs without them does not wish for them again.
    while wanted:
        wanted.pop()()
        again = steps(llama, WANTED_STEPS, tokens=3)
        assert len(wanted) <= 1
    assert len(llama.graphs._recordings) == 3
    for mine, other in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    llama.graphs = None


@needs_glibc
def test_a_recording_goes_with_its_last_reference(llama: Span) -> None:
    def used(recordings: int) -> int:
        """Bytes that are allocated after so many have been made and dropped."""
        for _ in range(recordings):
            recording.record(llama, Subject(1, 4), HIDDEN, Products([]))
        return allocated()

    before = used(3)  # the first ones leave behind what all share
    assert used(10) - before < 10 * (100 << 10)


class Looking(nn.Module):
    """A block that decides by the values of its states, as a bad recording would forget."""

    def __init__(self, inner: nn.Module, look: Any):
        super().__init__()
        self.inner, self.look = inner, look

    def forward(self, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return self.inner(hidden * self.look(hidden), *rest, **named)


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda hidden: 2.0 if bool(hidden.sum() > 0) else 0.5, id="refuses"),
        pytest.param(lambda hidden: float(hidden.detach().numpy().sum() > 0) + 0.5, id="differs"),
    ],
)
def test_blocks_that_look_at_their_states_are_not_recorded(look: Any, tmp_path: Path) -> None:
    span = loaded(tiny_model("llama", tmp_path))
    layers: Any = getattr(span._decoder, span.layers_name)
    span.layers[0] = layers[0] = Looking(layers[0], look)
    made = Graphs(span, HIDDEN, Products.of(span.layers), lambda call: call())
    for _ in range(WANTED_STEPS):
        assert made.find(1, 4, 1) is None
    assert made._recordings == {Subject(1, 1): None}
    assert made.find(1, 4, 1) is None


class Collecting(nn.Module):
    """A block that adds what it computes to something that it has made, as experts do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        collected = torch.zeros(hidden.shape)
        return collected.add_(self.inner(hidden, *rest, **named))


@pytest.mark.usefixtures("slowly")
def test_what_a_block_makes_for_itself_is_made_anew(tmp_path: Path) -> None:
    span = loaded(tiny_model("llama", tmp_path))
    layers: Any = getattr(span._decoder, span.layers_name)
    for index in range(3):
        span.layers[index] = layers[index] = Collecting(layers[index])
    plain = steps(span, 3)
    span.graphs = everything(span, sizes=[1])
    assert len(span.graphs) == 1
    for mine, other in zip(steps(span, 3), plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


class Scribbling(nn.Module):
    """A block that writes over what others are given as well."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        named["position_embeddings"][0].unsqueeze(1).add_(hidden.mean() * 1e-6)
        return self.inner(hidden, *rest, **named)


def test_blocks_that_write_over_what_others_need_are_not_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    span = loaded(tiny_model("llama", tmp_path))
    layers: Any = getattr(span._decoder, span.layers_name)
    span.layers[0] = layers[0] = Scribbling(layers[0])
    with caplog.at_level("INFO"):
        made = everything(span, sizes=[1])
    assert made._recordings == {Subject(1, 1): None}
    assert "writes over" in caplog.text


class Numbered(nn.Module):
    """A block that looks like its neighbours, and computes by its number."""

    def __init__(self, inner: nn.Module, number: int):
        super().__init__()
        self.inner, self.layer_idx = inner, number

    def forward(self, hidden: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return self.inner(hidden * self.layer_idx, *rest, **named)


@pytest.mark.usefixtures("slowly")
def test_blocks_that_only_look_alike_share_nothing(tmp_path: Path) -> None:
    span = loaded(tiny_model("llama", tmp_path))
    layers: Any = getattr(span._decoder, span.layers_name)
    for index in range(3):
        span.layers[index] = layers[index] = Numbered(layers[index], index + 1)
    assert span.likeness(1) == span.likeness(2)
    plain = steps(span, 3)
    span.graphs = everything(span, sizes=[1])
    assert len(span.graphs) == 3
    for mine, other in zip(steps(span, 3), plain, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", [linear.turned, linear.packed])
def test_ways_to_multiply_give_the_same(way: Any, bias: bool, tokens: int) -> None:
    noise = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(1, tokens, 24, generator=noise), torch.randn(40, 24, generator=noise)
    added = torch.randn(40, generator=noise) if bias else None
    products = Products([weight])
    assert products.can_pack([weight])
    operand = products.pack(weight) if way is linear.packed else weight
    expected = linear.plain(x, weight, added)
    torch.testing.assert_close(way(x, operand, added), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_not_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1 << 9, 1 << 9)

    class Memory:
        available = 2 * weight.numel() * weight.itemsize - 1

    products = Products([weight])
    assert products.can_pack([weight])
    assert not products.can_pack([weight.to(torch.float64)])
    monkeypatch.setattr(linear.psutil, "virtual_memory", Memory)
    assert not products.can_pack([weight])
