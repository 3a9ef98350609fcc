"""Errors of answers, what is honest, and what is drawn."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.client.audit import limits
from swarm_notebook.client.audit.choice import PieceSampler, share_asked
from swarm_notebook.client.audit.comparison import Errors, compare
from swarm_notebook.client.request import Request
from swarm_notebook.model.judge import HomeJudge
from swarm_notebook.net.addresses import is_public


@pytest.fixture(scope="module")
def judged(tiny_llama: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An input, and what three blocks make of it in float32 and in bfloat16."""
    judge = HomeJudge(resolve(tiny_llama))
    hidden = torch.randn(2, 24, 48, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    request = Request(1, 4, hidden, 0)
    return hidden, judge(request, torch.float32), judge(request, torch.bfloat16)


def wrong(answer: torch.Tensor, reference: torch.Tensor, twin: torch.Tensor | None) -> str:
    return limits.what_is_wrong(compare(answer, reference, twin), torch.float32)


def test_an_honest_half_in_another_form_passes(
    judged: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tiny_llama: Path
) -> None:
    hidden, reference, twin = judged
    blocks = load_blocks(resolve(tiny_llama), 1, 4, dtype=torch.bfloat16).model
    with torch.no_grad():
        answer = torch.cat(
            [
                blocks(inputs_embeds=row[None].bfloat16(), use_cache=False).last_hidden_state
                for row in hidden
            ]
        )
    assert not wrong(answer, reference, twin)
    assert not wrong(reference, reference, None)


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_states_of_another_length_are_found_in_every_dtype(
    judged: tuple[torch.Tensor, torch.Tensor, torch.Tensor], factor: float
) -> None:
    _, reference, twin = judged
    assert wrong(twin.float() * factor, reference, twin)
    assert "mean error" in wrong(reference * factor, reference, None)


def test_one_token_that_was_edited_is_found(
    judged: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, reference, _ = judged
    answer = reference.clone()
    answer[0, 5] *= 1.00125
    assert "error of a token" in wrong(answer, reference, None)


def test_positions_that_do_not_count_do_not_count() -> None:
    reference = torch.randn(1, 4, 8)
    answer = reference.clone()
    answer[0, 0] = 0
    mask = torch.tensor([[0, 1, 1, 1]])
    assert compare(answer, reference, mask=mask) == Errors(3)
    assert compare(answer, reference, mask=mask * 0) == Errors()


def test_audits_cost_no_more_than_the_rate() -> None:
    choice, spent, done = PieceSampler(0.02, random.Random(0)), 0.0, 0.0
    for number in range(200_000):
        length = number % 1000 + 1
        done += 10
        if choice.draw(1, 10, 10 * length, stranger=False):
            spent += 10 * length
    assert 0.015 * done < spent < 0.02 * done + 10 * 1000


def test_what_is_asked_for_seldom_is_audited_as_often() -> None:
    """Enough to compare in one of ten prompts: of those ten times the share is audited."""
    source = random.Random(0)
    choice, audited = PieceSampler(0.02, source), 0
    for _ in range(50_000):
        asked = source.random() < 0.1
        drawn = choice.draw(100, 100, 100, stranger=False, asked=0.1 if asked else 1.0)
        if drawn and not asked:
            choice.give_back(100)
        audited += drawn and asked
    assert 0.7 < audited / (0.02 * 50_000) <= 1.05


def test_what_cannot_be_audited_after_all_costs_nothing() -> None:
    choice = PieceSampler(0.5, random.Random(0))
    drawn = 0
    for _ in range(1000):
        if choice.draw(100, 100, 1000, stranger=False):
            choice.give_back(1000)
            drawn += 1
    assert drawn > 50  # one in twenty, and more as nothing is spent


def test_more_is_asked_for_within_a_percent_of_what_travels() -> None:
    assert share_asked(1024, 31) == pytest.approx(0.01 * 1024 / 31)
    assert share_asked(100_000, 31) == 1
    assert share_asked(100, 0) == 1


def test_a_stranger_is_audited_early_and_nobody_without_a_rate() -> None:
    waits = []
    for seed in range(200):
        choice = PieceSampler(0.001, random.Random(seed))
        waits.append(
            next(n for n in range(10_000) if choice.draw(1, 10, 10 * (n + 1), stranger=True))
        )
    assert 90 < sum(waits) / len(waits) < 170
    assert not PieceSampler(0.0).draw(10_000, 10, 10, stranger=True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("/ip4/127.0.0.1/tcp/1/p2p/Q", False),
        ("/ip4/192.168.1.7/tcp/1/p2p/Q", False),
        ("/ip6/::1/tcp/1/p2p/Q", False),
        ("/ip4/8.8.8.8/tcp/1/p2p/Q", True),
        ("/dns/example.org/tcp/1/p2p/Q", True),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_token_with_a_large_error_of_its_own_decides_over_nothing() -> None:
    torch.manual_seed(0)
    reference = torch.randn(1, 64, 32)
    scale = torch.full((64, 1), 0.01)
    scale[5] = 0.5
    answer, twin = (reference + scale * torch.randn(64, 32) for _ in range(2))
    errors = compare(answer, reference, twin)
    assert errors.ratio == pytest.approx(1, abs=0.1)
    assert errors.largest < 2
    assert abs(errors.mean_gain) < 1e-3
    edited = answer.clone()
    edited[:, 7] *= 1.2
    assert compare(edited, reference, twin).largest > 5
    answer[:, 5] *= 1.5
    assert abs(compare(answer, reference, twin).mean_gain) < 2e-3


def test_exact_tokens_make_up_for_no_others() -> None:
    torch.manual_seed(0)
    reference = torch.randn(1, 64, 32)
    answer, twin = (reference + 0.01 * torch.randn(64, 32) for _ in range(2))
    answer = reference + 4 * (answer - reference)
    answer[:, ::2] = reference[:, ::2]
    assert compare(answer, reference, twin).ratio == pytest.approx(2**0.5, rel=0.1)
