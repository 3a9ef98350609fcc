"""What servers can read is found out by trying, and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.letter_tokenizer import LetteredPair

from swarm_notebook.errors import Unsupported
from swarm_notebook.model import inversion
from swarm_notebook.report.privacy import Privacy
from swarm_notebook.tuning import DeepPrompts

TEXT = "Ada, 555-0137"


@pytest.fixture(scope="module")
def pair(lettered_pair: LetteredPair) -> LetteredPair:
    return lettered_pair


def test_the_states_are_those_of_the_local_model(pair: LetteredPair) -> None:
    ids = torch.tensor(pair.tokenizer(TEXT)["input_ids"])
    with torch.no_grad():
        local = pair.local(ids[None], output_hidden_states=True)
    observed = inversion.observe(pair.swarm.model, ids)
    assert len(observed.states) == 6
    # The last of the local ones went through the final norm.
    for ours, theirs in zip(observed.states[:5], local.hidden_states, strict=False):
        torch.testing.assert_close(ours, theirs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(observed.logits, local.logits[0], atol=1e-4, rtol=0)


def test_every_token_is_recovered_from_the_first_blocks(pair: LetteredPair) -> None:
    found = pair.swarm.privacy(TEXT)
    assert [one.after for one in found.boundaries if one.inverted is not None] == [1, 2, 4]
    assert found.readable == 1.0
    for boundary in (0, 1, 2, 4):
        assert found.boundaries[boundary].share == 1.0
        assert found.boundaries[boundary].text == found.text == TEXT
    assert found.boundaries[0].nearest == 1.0
    assert found.boundaries[2].seen_by == ("local-0", "local-1")
    assert "servers can read 100% of 13 tokens" in repr(found)
    assert "<svg" in found.as_html()
    assert list(found.to_pandas()["boundary"]) == list(range(6))


def test_blocks_at_home_change_where_not_whether(pair: LetteredPair) -> None:
    pair.swarm.own([0, 1, 2, -1])
    try:
        found = pair.swarm.privacy(TEXT, tokens=6)
    finally:
        pair.swarm.release()
    assert found.text == TEXT[:6]
    assert [bool(one.seen_by) for one in found.boundaries] == [False] * 3 + [True] * 2 + [False]
    assert found.boundaries[3].share == 1.0
    assert "It can read 100% of them" in found.advice
    assert "hide nothing" in repr(found)


def test_only_what_was_asked_for_is_tried(pair: LetteredPair) -> None:
    found = pair.swarm.privacy(pair.tokenizer(TEXT)["input_ids"], tokens=2, boundaries=[])
    assert all(one.inverted is None for one in found.boundaries)
    for wrong in ({"boundaries": [6]}, {"tokens": 0}):
        options: dict[str, Any] = wrong
        with pytest.raises(ValueError, match="give"):
            pair.swarm.privacy(TEXT, **options)
    prompts = DeepPrompts(pair.swarm.model, 2)
    with pytest.raises(Unsupported, match="deep prompts"):
        pair.swarm.privacy(TEXT)
    prompts.remove()


def test_all_at_home() -> None:
    nothing = Privacy("m", "", 1, (), home=(0,))
    assert "no server sees anything" in nothing.headline
