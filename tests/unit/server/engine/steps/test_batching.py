"""Sessions whose steps share calls against twins that run alone, for every family.

Each session goes its own way (`random_sessions`). In every round some of them have a step, and
those that can share a call do.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_sessions import RandomSession, prepared
from support.tiny import COMMON, FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import AdapterMissing
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import SHORT_TOKENS, Batching
from swarm_notebook.server.engine.steps.session_state import SessionState, run_one

HIDDEN = 48
SESSIONS, ROUNDS = 5, 12
# They do not call transformers' attention interface.
PLAIN = {"BloomBlock", "FalconDecoderLayer"}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def span(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Span:
    folder: Path = tiny_model(request.param, tmp_path_factory.mktemp("models"))
    loaded = load_blocks(resolve(folder), 1, 4, dtype=torch.float32)
    return Span(loaded.decoder, loaded.layers_name, 1)


@pytest.fixture(scope="module")
def batching(span: Span) -> Batching:
    return Batching.try_out(span, HIDDEN)


def close(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def test_sessions_that_share_calls_get_what_they_get_alone(span: Span, batching: Batching) -> None:
    alone = [RandomSession(span, HIDDEN, seed) for seed in range(SESSIONS)]
    together = {session: SessionState(span, context=None) for session in alone}
    dice, largest = random.Random(0), 0
    for _ in range(ROUNDS):
        groups = defaultdict(list)
        for session in dice.sample(alone, dice.randint(2, SESSIONS)):
            step = session.step()
            turn = prepared(together[session], step)
            key = batching.group(step, turn.position)
            groups[key or session].append((session, turn))
        for members in groups.values():
            turns = [turn for _, turn in members]
            largest = max(largest, len(turns))
            results = Batching().run(turns) if len(turns) > 1 else [run_one(turns[0])]
            for (session, turn), got in zip(members, results, strict=True):
                if isinstance(got, Exception):
                    raise got
                close(got, session.run(turn.step))
    assert largest >= 3 or not batching.possible
    assert batching.possible != (type(span.layers[0]).__name__ in PLAIN)


def test_steps_that_concern_the_whole_call_run_alone(batching: Batching) -> None:
    one = torch.randn(1, 1, HIDDEN)
    prompts = torch.randn(3, 1, 4, HIDDEN)

    def group(position: int = 9, hidden: torch.Tensor = one, **fields: Any) -> Any:
        return batching.group(Step((1, 4), hidden, **fields), position)

    if not batching.possible:
        assert group() is None
        return
    assert group() == group(hidden=torch.randn(4, 2, HIDDEN)) == group(states=(1,))
    assert group(prompts=prompts) == group()
    assert group(adapter=("a", 1)) == group()
    alone: list[dict[str, Any]] = [
        {"prompts": prompts, "position": 3},
        {"hidden": torch.randn(1, SHORT_TOKENS + 1, HIDDEN)},
        {"hidden": one[:, :0]},
        {"inner": ((1, "self_attn"),)},
        {"seed": 1, "adapter": ("a", 1)},
    ]
    for fields in alone:
        assert group(**fields) is None


@pytest.mark.parametrize(
    ("family", "rope", "shared"),
    [
        ("llama", {"rope_type": "linear", "factor": 2.0}, True),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, False),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 64,
                "factor": 4.0,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0] * 6,
            },
            False,
        ),
    ],
)
def test_rotations_that_would_stretch_for_everybody(
    family: str, rope: dict[str, Any], shared: bool, tmp_path: Path
) -> None:
    """One session beyond the original length changes the rotations of a whole call."""
    parameters = {"rope_theta": 10000.0, **rope}
    config = AutoConfig.for_model(
        family, **{**COMMON, **FAMILIES[family], "rope_parameters": parameters}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load_blocks(resolve(tmp_path), 1, 4, dtype=torch.float32)
    span = Span(loaded.decoder, loaded.layers_name, 1)
    assert Batching.try_out(span, HIDDEN).possible == shared


@pytest.fixture
def sessions(span: Span, batching: Batching) -> list[SessionState]:
    if not batching.possible:
        pytest.skip("runs session by session")
    made = [SessionState(span, context=None) for _ in range(3)]
    for seed, state in enumerate(made):
        hidden = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(seed))
        run_one(prepared(state, Step((1, 4), hidden)))
    return made


@pytest.mark.parametrize("span", ["llama"], indirect=True)
def test_an_error_belongs_to_its_session_alone(sessions: list[SessionState]) -> None:
    def refuse(_: Step) -> Span:
        raise AdapterMissing("upload it")

    step = Step((1, 4), torch.randn(1, 1, HIDDEN))
    turns = [prepared(state, step) for state in sessions]
    sessions[1].span_for = refuse
    first, second, third = Batching().run(turns)
    assert isinstance(second, AdapterMissing)
    assert sessions[1].cache.length == 3
    for state, got in ((sessions[0], first), (sessions[2], third)):
        again = Step((1, 4), step.hidden, position=3)
        close(got, run_one(prepared(state, again)))


@pytest.mark.parametrize("span", ["llama"], indirect=True)
def test_a_shared_call_that_fails_hurts_only_the_guilty(sessions: list[SessionState]) -> None:
    """The cache of one session breaks in the second block, after the first has been written."""
    broken = sessions[1].cache
    update = broken.update

    def fail(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *rest: Any) -> Any:
        if layer_idx == 2:
            raise RuntimeError("no more")
        return update(keys, values, layer_idx, *rest)

    broken.update = fail  # type: ignore[method-assign]
    step = Step((1, 4), torch.randn(1, 1, HIDDEN))
    first, second, third = Batching().run([prepared(state, step) for state in sessions])
    assert isinstance(second, RuntimeError)
    for state, got in ((sessions[0], first), (sessions[2], third)):
        assert state.cache.length == 4
        close(got, run_one(prepared(state, Step((1, 4), step.hidden, position=3))))
