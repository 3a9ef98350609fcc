"""The lens widget: what it sends to a browser, and what it gives back to Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import traitlets
from support.patience import wait_until

from swarm_notebook import probing
from swarm_notebook.probing.grid import visible
from swarm_notebook.probing.subject import Subject
from swarm_notebook.widgets import LensWidget

TEXT = "<b>Hi</b> you"


@pytest.fixture
def lens(lettered: Any) -> LensWidget:
    return LensWidget(lettered.model, TEXT, tokenizer=lettered.tokenizer)


def act(widget: LensWidget, action: str, **arguments: Any) -> None:
    """As the script does it; waits for what runs in the background."""
    widget._handle_custom_msg({"action": action, "with": arguments}, [])
    wait_until(lambda: not widget.ranking)


def ranks(widget: LensWidget) -> torch.Tensor:
    values = np.frombuffer(widget.ranks, np.uint32).astype(np.int64)
    return torch.from_numpy(values).reshape(len(widget.blocks), len(widget.words))


def test_the_bytes_are_the_lens(lens: LensWidget) -> None:
    shape = (5, len(TEXT), 5)
    assert (len(lens.blocks), len(lens.words), lens.top) == shape
    found = lens.lens
    chances = np.frombuffer(lens.chances, np.float32).reshape(shape)
    assert np.array_equal(chances, found.probabilities.numpy())
    assert np.array_equal(np.frombuffer(lens.entropy, np.float32), found.entropy.flatten().numpy())
    tops = np.frombuffer(lens.tops, np.uint32).reshape(shape)
    shown = [lens.vocabulary[number] for number in tops[3, 2]]
    assert shown == [visible(word) for word in found.predictions[3][2]]
    assert lens.vocabulary_size == 128


def test_a_selected_cell_is_that_hidden_state(lens: LensWidget, lettered: Any) -> None:
    with pytest.raises(LookupError, match="no cell is selected"):
        _ = lens.hidden_state
    lens.set_state({"selected": [3, 7]})  # as a browser does
    ids = lettered.tokenizer(TEXT, return_tensors="pt").input_ids
    states = lettered.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(lens.hidden_state, states[4][0, 7])
    for wrong in ([5, 0], [0, len(TEXT)], [-1, 0], [1]):
        with pytest.raises(traitlets.TraitError, match="is not a cell"):
            lens.selected = wrong
    assert lens.selected == [3, 7]


def test_only_the_end_of_a_long_text_is_shown(lettered: Any) -> None:
    part = LensWidget(lettered.model, TEXT, last=3, tokenizer=lettered.tokenizer)
    assert (part.words, part.first) == (list("you"), len(TEXT) - 3)
    part.selected = [4, len(TEXT) - 1]
    whole = LensWidget(lettered.model, TEXT, tokenizer=lettered.tokenizer)
    whole.selected = [4, len(TEXT) - 1]
    assert torch.equal(part.hidden_state, whole.hidden_state)


def test_ranks_of_a_word_and_of_a_shown_token(lens: LensWidget, lettered: Any) -> None:
    act(lens, "rank", token="y")
    assert (lens.token, lens.colour) == ("y", "rank")
    y = lettered.tokenizer("y").input_ids[0]
    assert torch.equal(ranks(lens), probing.token_ranks(lettered.model, lens.lens.states, y))
    number = int(np.frombuffer(lens.tops, np.uint32)[-5])  # the top token of the last cell
    act(lens, "rank_number", number=number)
    assert lens.token == lens.vocabulary[number]
    assert ranks(lens)[-1, -1] == 1
    again = LensWidget(lettered.model, TEXT, token=y, tokenizer=lettered.tokenizer)
    assert (again.token, again.colour) == ("y", "rank")


def test_what_cannot_be_ranked_is_said(lens: LensWidget, lettered: Any) -> None:
    act(lens, "rank", token="you")
    assert lens.error.startswith(
        "ValueError: token: ranking needs a single token; 'you' is 3 (y o u)"
    )
    assert not lens.ranks
    act(lens, "dismiss")
    act(lens, "rank_number", number=10_000)
    assert "not in the vocabulary" in lens.error
    with pytest.raises(ValueError, match="not in the vocabulary of 128"):
        LensWidget(lettered.model, TEXT, token=128, tokenizer=lettered.tokenizer)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        LensWidget(lettered.model, [5, 6], token="y")


def test_a_twin_leaves_the_model_alone(lettered: Any) -> None:
    """What a widget's thread does to its view of a model is not seen by the notebook's cells."""
    subject = Subject.of(lettered.model, lettered.tokenizer)
    twin = subject.twin()
    ids = torch.tensor([[40, 41, 42]])
    before = lettered.model(ids).logits
    twin.model.train()
    with twin.editing(2, lambda state: state * 0):
        assert not torch.allclose(twin.model(ids).logits, before)
        assert torch.equal(lettered.model(ids).logits, before)
    assert not lettered.model.training
    assert twin.model.lm_head.weight is lettered.model.lm_head.weight


def test_shown_without_a_script(lens: LensWidget) -> None:
    assert repr(lens) == f"<LensWidget: {lens.title}, 5 blocks x 13 tokens>"
    assert '<th scope="col">&lt;</th><th scope="col">b</th>' in lens.picture()
