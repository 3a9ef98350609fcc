"""Audits of one server are added up; a single witness condemns nobody by it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from swarm_notebook.client.audit.comparison import Errors
from swarm_notebook.client.audit.evidence import Evidence
from swarm_notebook.client.audit.limits import MIN_TOKENS, what_is_wrong

ANN, BOB = frozenset({"ann"}), frozenset({"bob"})


def audits(ratio: float, spread: float = 0.03, seed: int = 0) -> list[Errors]:
    """Of 32 tokens each; 0.03 is what single ones of honest servers differ by."""
    drawn, twin = random.Random(seed), 8e-3 * MIN_TOKENS
    found = [drawn.gauss(ratio, spread) for _ in range(400)]
    return [
        Errors(MIN_TOKENS, twin * one, twin, largest=2.0, ratios=MIN_TOKENS * math.log(one))
        for one in found
    ]


def tokens_until_doubted(evidence: Evidence, found: list[Errors], by: frozenset[str]) -> int | None:
    for number, errors in enumerate(found, 1):
        if evidence.add("liar", by, errors):
            return number * MIN_TOKENS
    return None


@pytest.mark.parametrize(("ratio", "most"), [(1.17, 256), (1.07, 3072)])
def test_a_small_lie_is_found_over_some_audits(ratio: float, most: int) -> None:
    for seed in range(20):
        found = tokens_until_doubted(Evidence(), audits(ratio, seed=seed), ANN)
        assert found is not None
        assert found <= most


@pytest.mark.parametrize("ratio", [0.985, 1.0, 1.021, 1.044])
def test_honest_rounding_never_adds_up(ratio: float) -> None:
    for seed in range(20):
        assert tokens_until_doubted(Evidence(), audits(ratio, seed=seed), ANN) is None


def test_a_witness_alone_does_not_count_and_is_not_asked_again() -> None:
    evidence = Evidence()
    assert tokens_until_doubted(evidence, audits(1.2), ANN)
    assert not evidence.counts("liar")
    assert evidence.doubters("liar") == {"ann"}
    assert not evidence.doubters("another")
    # Whoever stands in both chains is one witness all the same.
    assert tokens_until_doubted(evidence, audits(1.2), ANN | {"eve"})
    assert not evidence.counts("liar")
    assert tokens_until_doubted(evidence, audits(1.2), BOB)
    assert evidence.counts("liar")
    evidence.forget("liar")
    assert not evidence.counts("liar")
    assert not evidence.doubters("liar")


def test_the_notebook_itself_needs_no_second() -> None:
    evidence = Evidence()
    assert tokens_until_doubted(evidence, audits(1.2), frozenset())
    assert evidence.counts("liar")


def test_what_is_long_past_does_not_excuse() -> None:
    evidence = Evidence()
    for errors in audits(1.0):
        assert not evidence.add("liar", ANN, errors)
    found = tokens_until_doubted(evidence, audits(1.17), ANN)
    assert found is not None
    assert found <= 256


def test_it_does_not_grow_with_all_that_were_ever_audited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("swarm_notebook.client.audit.evidence.MOST_SUMS", 20)
    evidence = Evidence()
    assert tokens_until_doubted(evidence, audits(1.2), ANN)
    errors = audits(1.0)[0]
    for number in range(19):
        evidence.add(f"peer{number}", ANN, errors)
    assert evidence.doubters("liar") == {"ann"}, "it is among the latest twenty"
    for number in range(1000):
        evidence.add(f"new{number}", ANN, errors)
    assert not evidence.doubters("liar")
    # Who is audited again and again stays, whoever comes besides.
    for number, errors in enumerate(audits(1.2)):
        evidence.add("liar", BOB, errors)
        evidence.add(f"other{number}", BOB, errors)
    assert evidence.doubters("liar") == {"bob"}


def test_float32_has_no_share_in_it() -> None:
    evidence = Evidence()
    for _ in range(100):
        assert not evidence.add("liar", ANN, Errors(MIN_TOKENS, 1.0))


def test_tokens_that_are_far_off_are_counted_over_audits() -> None:
    """One is allowed in each audit, three of several are not."""
    evidence, said = Evidence(), []
    for errors in audits(1.0)[:3]:
        assert not what_is_wrong(replace(errors, outliers=1), torch.bfloat16)
        said.append(evidence.add("liar", ANN, replace(errors, outliers=1)))
    assert said[:2] == ["", ""]
    assert "far from" in said[2]
    assert what_is_wrong(replace(errors, outliers=2), torch.bfloat16)
