"""What each token shows: the pieces together are the text, and no piece is half a character."""

from __future__ import annotations

from typing import Any

import pytest

from swarm_notebook.checkpoint.files.demo import demo_model
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.writing.draft import Draft, Token, common_prefix
from swarm_notebook.writing.pieces import BROKEN, Pieces, Vocabulary
from swarm_notebook.writing.timing import Timing

TEXTS = [
    "The capital of France is Paris.",
    "A family 👩‍👩‍👧‍👦, a flag 🇺🇦, and ends with 🦜",
    "\u202egnirts desrever\u202c مرحبا بالعالم שלום",
    "<script>alert('x')</script>\n\n  indented\ttab",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 5,
    "日本語のテキスト",
]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer: Any = resolve(demo_model()).tokenizer()
    return Vocabulary(tokenizer)


def ids_of(vocabulary: Vocabulary, text: str) -> list[int]:
    return list(vocabulary._tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", "The 🦜 said: "])
def test_pieces_are_the_text(vocabulary: Vocabulary, text: str, before: str) -> None:
    pieces = Pieces(vocabulary, ids_of(vocabulary, before))
    ids = ids_of(vocabulary, text)
    for token in ids:
        pieces.add(token)
    assert "".join(pieces.texts) == text
    assert not any(BROKEN in piece for piece in pieces.texts)
    for cut in range(len(ids), -1, -3):
        pieces.truncate(cut)
        for token in ids[cut:]:
            pieces.add(token)
        assert "".join(pieces.texts) == text


def test_an_emoji_shows_with_its_last_token(vocabulary: Vocabulary) -> None:
    ids = ids_of(vocabulary, "🦜")
    assert len(ids) > 1
    pieces = Pieces(vocabulary)
    assert [pieces.add(token) for token in ids] == [""] * (len(ids) - 1) + ["🦜"]


def test_bytes_that_are_no_character_are_shown_in_the_end(vocabulary: Vocabulary) -> None:
    first = ids_of(vocabulary, "🦜")[0]
    pieces = Pieces(vocabulary)
    for _ in range(9):
        pieces.add(first)
    shown = "".join(pieces.texts)
    assert shown
    assert set(shown) == {BROKEN}
    pieces.add(ids_of(vocabulary, " and")[0])
    assert "".join(pieces.texts).endswith(" and")


def test_single_tokens(vocabulary: Vocabulary) -> None:
    assert vocabulary.show(ids_of(vocabulary, "the Paris")[-1]) == " Paris"
    assert BROKEN not in vocabulary.show(ids_of(vocabulary, "🦜")[0])
    end = vocabulary._tokenizer.eos_token_id
    assert vocabulary.special(end)
    assert vocabulary.show(end) == vocabulary._tokenizer.eos_token


def test_a_replaced_token_keeps_what_is_known_of_its_place() -> None:
    draft = Draft([1, 2], [Token(5, 0.6, ((5, 0.6), (7, 0.3))), Token(6, 0.9)])
    other = draft.branch(0, [7, 8])
    assert other.tokens == [Token(7, 0.3, ((5, 0.6), (7, 0.3))), Token(8)]
    longer = other.branch(2, [9])
    assert longer.ids == [1, 2, 7, 8, 9]
    assert draft.ids == [1, 2, 5, 6]
    assert other.ids == [1, 2, 7, 8]
    for position in (-1, 3):
        with pytest.raises(IndexError):
            draft.branch(position, [1])


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2


def test_timing() -> None:
    timing = Timing(began=10.0)
    assert (timing.to_first, timing.per_second, timing.shares) == (None, None, {})
    timing.passed({"a": 0.5})
    timing.token(11.0)
    for now in (11.5, 12.0):
        timing.passed({"a": 0.25, "b": 0.1})
        timing.token(now)
    assert timing.to_first == 1.0
    assert timing.per_second == 2.0
    assert timing.shares == {"a": 0.5, "b": 0.1}


def test_tokens_are_known_in_which_a_server_had_a_part() -> None:
    parts = ["", "a", "ab", "b", "", "a"]
    draft = Draft([1], [Token(at, 0.5, servers=frozenset(part)) for at, part in enumerate(parts)])
    assert draft.touched({"a"}) == [(1, 3), (5, 6)]
    assert draft.touched({"a", "b"}) == [(1, 4), (5, 6)]
    assert draft.touched({"c"}) == []
    # Another token in a place was among those that were computed for it; what is typed was not.
    assert draft.branch(2, [9, 9]).touched({"b"}) == [(2, 3)]
