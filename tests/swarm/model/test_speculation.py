"""Tokens guessed ahead: one pass per verification, and the same outcome."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.hosting import HostedSwarm
from support.scene import Scene, generate
from transformers import PreTrainedModel

import swarm_notebook as sn
from swarm_notebook.model.generation import drafting

NEW = 40


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of each pass through the model."""
    passes: list[int] = []
    decoder: Any = model.get_decoder()
    with decoder.layers[0].register_forward_pre_hook(
        lambda _module, inputs: passes.append(inputs[0].shape[1])
    ):
        yield passes


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant", "auto"])
def test_a_verification_is_one_pass(tiny_scene: Scene, kind: str) -> None:
    """Counted locally and remotely: equal, and no request is spent on a rollback."""
    ids = tiny_scene.ids(1, 20).repeat(1, 3)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    expected = generate(tiny_scene.reference, ids, **options)
    if kind == "assistant":
        options["assistant_model"] = tiny_scene.reference
    elif kind == "prompt lookup":
        options["prompt_lookup_num_tokens"] = 5
    remote: Any = tiny_scene.remote
    with drafting.drafts("auto" if kind == "auto" else None, options), counted(remote) as passes:
        ours = generate(remote, ids, **options)
    tiny_scene.same(ours, expected)
    steps = tiny_scene.swarm.trace().passes
    assert [one.tokens for one in steps] == passes
    assert all(len(one.servers) == 2 for one in steps)
    # The random model never goes on as before: guesses are made, found wrong and rolled back.
    assert any(one.tokens > 1 for one in steps[1:])
    if kind == "assistant":  # which is the same model, and always right
        assert len(steps) <= NEW // 2


def test_sampling_draws_from_the_same_distribution(tiny_scene: Scene) -> None:
    """The second new token's frequencies, with guesses and by the model's own probabilities."""
    ids = tiny_scene.ids(1, 6).repeat(1, 3)
    draws, options = 100, {"do_sample": True, "top_k": 4, "temperature": 2.0}
    with torch.no_grad():
        first = _distribution(tiny_scene.reference, ids)
        exact = torch.zeros(tiny_scene.reference.config.vocab_size)
        for token in first.nonzero()[:, 0].tolist():
            longer = torch.cat([ids, torch.tensor([[token]])], dim=1)
            exact += first[token] * _distribution(tiny_scene.reference, longer)
    torch.manual_seed(0)
    seen = torch.zeros_like(exact)
    with drafting.drafts("auto", options):
        for _ in range(draws):
            out = tiny_scene.remote.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **options
            )
            seen[out[0, -1]] += 1 / draws
    # Total variation of 100 draws among at most 16 tokens is 0.15, wrong first tokens alone 0.5.
    assert 0.5 * (seen - exact).abs().sum() < 0.25


def _distribution(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids).logits[0, -1] / 2.0
    kept = logits.topk(4)
    return torch.zeros_like(logits).scatter(0, kept.indices, kept.values.softmax(-1))


def test_a_draft_that_is_none_of_these(demo_swarm: HostedSwarm) -> None:
    with (
        sn.connect(demo_swarm.initial_peers, model=demo_swarm.model) as swarm,
        pytest.raises(ValueError, match="draft: 'fast'"),
    ):
        swarm.generate("Hello", draft="fast")


@pytest.mark.works('Generation: `draft="auto"`')
def test_a_text_that_repeats_itself(
    demo_swarm: HostedSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying a list out: the same text in a third of the passes."""
    # How many tokens are guessed follows from how long passes take, which is this machine's matter.
    expected = drafting.DraftLength().cost()
    monkeypatch.setattr(drafting.DraftLength, "cost", lambda _: expected)
    text = "\n".join(f"{name} = {name.upper()}_{size}" for size, name in enumerate(NAMES))
    prompt = f"{text}\n{text}\n{text[:40]}"
    with sn.connect(demo_swarm.initial_peers, model=demo_swarm.model) as swarm:
        options: dict[str, Any] = {"chat": False, "max_new_tokens": 48, "do_sample": False}
        plain = swarm.generate(prompt, **options)
        passes = len(swarm.trace().passes)
        assert swarm.generate(prompt, draft="auto", **options) == plain
        assert 3 * len(swarm.trace().passes) <= passes
        options |= {"max_new_tokens": 8, "num_beams": 2}
        assert swarm.generate(prompt, draft="auto", **options) == swarm.generate(prompt, **options)


NAMES = ["height", "width", "depth", "weight", "colour", "price", "maker", "origin"]
