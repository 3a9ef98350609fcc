"""What a session remembers, against a plain model of it: one tensor that is cut and indexed."""

import random

import torch

from swarm_notebook.client.session.history import History, Pass


def recorded(history: History, length: int) -> torch.Tensor:
    """The inputs of block 0 that a replay would send."""
    parts = [part.input_of(0) for part in history.replay(0, 4, length)]
    return torch.cat(parts, dim=1) if parts else torch.empty(0)


def test_any_mix_of_passes_rollbacks_and_row_selections() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        history, rows = History(), 3
        truth = torch.empty(rows, 0, 2)
        for _ in range(20):
            action = rng.choice(["pass", "pass", "pass", "crop", "select"])
            if action == "pass":
                new = torch.randn(rows, rng.randint(1, 4), 2)
                history.begin(Pass(truth.shape[1], new.shape[1], {0: new}))
                truth = torch.cat([truth, new], dim=1)
            elif action == "crop" and truth.shape[1]:
                keep = rng.randint(0, truth.shape[1])
                history.truncate(keep)
                truth = truth[:, :keep]
            elif action == "select" and history:
                index = torch.tensor([rng.randrange(rows) for _ in range(rng.randint(1, 4))])
                history.select(index)
                truth, rows = truth[index], len(index)
            if rng.random() < 0.3 and truth.shape[1]:
                assert torch.equal(recorded(history, truth.shape[1]), truth)
        if truth.shape[1]:
            assert torch.equal(recorded(history, truth.shape[1]), truth)


def test_who_has_had_a_part_in_a_text_is_known_until_it_is_rebuilt_without_them() -> None:
    history = History()
    for position, peers in enumerate(({"a": 0, "b": 2}, {"a": 0, "c": 2}, {"a": 0})):
        new = Pass(position, 1, {0: torch.zeros(1, 1, 2)}, {2: torch.zeros(1, 1, 2)})
        history.begin(new)
        new.peers |= peers
    assert history.peers.keys() == {"a", "b", "c"}
    twin = history.copy()
    twin.truncate(1)
    assert twin.peers.keys() == {"a", "b"}
    twin.select(torch.tensor([0, 0]))
    assert twin.peers.keys() == {"a", "b"}
    assert history.distrust({"nobody"}) is None
    assert history.distrust({"c"}) == (2, 1)
    assert history.peers.keys() == {"a", "b"}
    # Whoever had the first block has had a part in every input behind it.
    assert history.distrust({"a", "b"}) == (0, 0)
    assert [part.inputs for part in history.passes()] == [{}, {}, {}]
    assert (history.peers, twin.peers.keys()) == ({}, {"a", "b"})


def test_passes_with_equal_edits_are_replayed_as_one() -> None:
    history = History()
    for position in range(6):
        edits = {0: torch.full((1, 1, 2), float(position))}
        if position >= 4:
            edits[2] = torch.full((1, 1, 2), 10.0 + position)
        history.begin(Pass(position, 1, edits))
    plain, edited = history.replay(0, 4, 6)
    assert (plain.position, plain.length, plain.cuts(0, 4)) == (0, 4, [0, 4])
    assert (edited.position, edited.length, edited.cuts(0, 4)) == (4, 2, [0, 2, 4])
    assert edited.edits[2][0, :, 0].tolist() == [14.0, 15.0]
    # For a server that begins at the edited block it is an input like any other.
    history.learn(2, 0, torch.zeros(1, 6, 2))
    (part,) = history.replay(2, 4, 6)
    assert part.input_of(2)[0, :, 0].tolist() == [0.0, 0.0, 0.0, 0.0, 14.0, 15.0]


def test_what_a_replay_derives_is_remembered() -> None:
    history = History()
    history.begin(Pass(0, 3, {0: torch.zeros(1, 3, 2)}))
    history.begin(Pass(3, 1, {0: torch.zeros(1, 1, 2)}))
    derived = torch.arange(8.0).reshape(1, 4, 2)
    history.learn(2, 0, derived)
    (part,) = history.replay(2, 4, 4)
    assert torch.equal(part.input_of(2), derived)


def test_masks_and_positions_are_filled_in_where_some_passes_had_none() -> None:
    history = History()
    first = Pass(0, 2, {0: torch.zeros(2, 2, 1)}, mask=torch.tensor([[0, 1], [1, 1]]))
    first.position_ids = torch.tensor([[1, 0], [0, 1]])
    history.begin(first)
    history.begin(Pass(2, 1, {0: torch.zeros(2, 1, 1)}))
    (part,) = history.replay(0, 1, 3)
    assert part.mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert part.position_ids.tolist() == [[1, 0, 2], [0, 1, 2]]
