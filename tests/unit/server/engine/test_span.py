"""A server's blocks with their cache against the whole local model, for every family.

The chain is cut into uneven spans, each with its own cache as on its own server, and a step is
whatever a client may send: a prefill, one token, a rollback, other rows, some of the blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.errors import BadRequest, Unsupported
from swarm_notebook.server.engine.requests import Step
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.session_state import SessionState

TOLERANCE = 1e-4


@dataclass
class Case:
    """A local model, its blocks as two hosted spans, and what goes in and out of its blocks."""

    model: Any
    spans: list[Span]

    @property
    def end(self) -> int:
        return self.spans[-1].end

    def states(self, ids: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        """The local model's input of block 0, then the output of every block."""
        inputs: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        layers = _layers(self.model, self.end)

        def keep(_layer: Any, arguments: tuple, output: Any) -> None:
            if not inputs:
                inputs.append(arguments[0])
            states.append(output if isinstance(output, torch.Tensor) else output[0])

        handles = [layer.register_forward_hook(keep) for layer in layers]
        with torch.no_grad():
            # With a cache, as servers compute; without one HF looks for packed sequences.
            self.model(ids, use_cache=True, **options)
        for handle in handles:
            handle.remove()
        return [*inputs, *states]

    def sessions(self) -> list[SessionState]:
        return [SessionState(span, context=None) for span in self.spans]


def _layers(model: Any, count: int) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise LookupError("no list of blocks")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder: Path = tiny_model(request.param, tmp_path_factory.mktemp("models"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source, blocks = resolve(folder), model.config.num_hidden_layers
    spans = []
    for start, end in ((0, 1), (1, blocks)):
        loaded = load_blocks(source, start, end, dtype=torch.float32)
        spans.append(Span(loaded.decoder, loaded.layers_name, start))
    return Case(model, spans)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def advance(state: SessionState, hidden: torch.Tensor, **fields: Any) -> list[torch.Tensor]:
    """One step as `session` does it, cut into two pieces if it is long."""
    blocks = fields.pop("blocks", (state.cache.start, state.cache.end))
    step = Step(blocks, hidden, **fields)
    position = state.check(step)
    needed = state.needs(step, position)
    if needed is not None:
        state.cache.reserve(needed[0] // step.rows)
    cut = step.length // 2 + 1 if step.length > 6 else step.length
    pieces = [state.run(step, position, 0, cut)]
    if cut < step.length:
        pieces.append(state.run(step, position, cut, step.length))
    return [torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)]


def chain(sessions: list[SessionState], hidden: torch.Tensor, **fields: Any) -> torch.Tensor:
    for state in sessions:
        hidden = advance(state, hidden, **fields)[0]
    return hidden


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_prefill_and_decode(case: Case) -> None:
    expected = case.states(random_ids(2, 20))
    sessions = case.sessions()
    got = [
        chain(sessions, expected[0][:, begin:end])
        for begin, end in ((0, 9), (9, 10), (10, 11), (11, 17), (17, 18), (18, 20))
    ]
    close(torch.cat(got, dim=1), expected[-1])


def test_left_padded_batch(case: Case) -> None:
    ids, mask = random_ids(3, 16), torch.ones(3, 16, dtype=torch.long)
    for row, pads in enumerate((0, 4, 9)):
        mask[row, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options: dict[str, Any] = {"attention_mask": mask}
    if case.spans[0].takes_positions:
        options["position_ids"] = positions
    expected = case.states(ids, **options)
    sessions = case.sessions()
    for begin, end in ((0, 10), (10, 11), (11, 12), (12, 16)):
        piece = slice(begin, end)
        got = chain(
            sessions,
            expected[0][:, piece],
            # A step whose tokens are all real may leave the mask out.
            attention_mask=mask[:, piece] if begin == 0 else None,
            position_ids=positions[:, piece],
        )
        real = mask[:, piece].bool()
        close(got[real], expected[-1][:, piece][real])


def test_rollback_and_decode_again(case: Case) -> None:
    """Back beyond the sliding window, on another continuation."""
    first = random_ids(1, 18)
    second = torch.cat([first[:, :4], random_ids(1, 12, seed=1)], dim=1)
    sessions = case.sessions()
    chain(sessions, case.states(first)[0])
    expected = case.states(second)
    got = chain(sessions, expected[0][:, 4:10], position=4)
    got = torch.cat([got, chain(sessions, expected[0][:, 10:])], dim=1)
    close(got, expected[-1][:, 4:])


def test_rollback_of_some_blocks(case: Case) -> None:
    """An edited input of block 2 is rerun from there; the blocks before keep what they have."""
    state, expected = case.sessions()[1], case.states(random_ids(2, 14))
    start, middle, end = state.cache.start, 2, state.cache.end
    advance(state, expected[1][:, :12], blocks=(start, end))
    edited = expected[middle][:, 12:13]
    advance(state, torch.randn_like(edited) + expected[1][:, 12:13], blocks=(start, middle))
    advance(state, torch.randn_like(edited), blocks=(middle, end), position=12)
    advance(state, expected[1][:, 12:13], blocks=(start, middle), position=12)
    got = advance(state, edited, blocks=(middle, end), position=12)[0]
    close(got, expected[-1][:, 12:13])
    got = advance(state, expected[1][:, 13:], blocks=(start, end))[0]
    close(got, expected[-1][:, 13:])


def test_rows_are_selected_repeated_and_dropped(case: Case) -> None:
    ids = random_ids(2, 14)
    sessions = case.sessions()
    chain(sessions, case.states(ids)[0][:, :8])
    for rows, begin, end in (([1, 1, 0, 1], 8, 10), ([2, 1, 0, 0], 10, 12), ([1], 12, 14)):
        ids = ids[rows]
        ids[:, begin:end] = random_ids(len(rows), end - begin, seed=begin)
        expected = case.states(ids)
        got = chain(sessions, expected[0][:, begin:end], row_ids=rows)
        close(got, expected[-1][:, begin:end])


def test_states_of_inner_blocks(case: Case) -> None:
    expected = case.states(random_ids(1, 12))
    state = case.sessions()[1]
    wanted = tuple(range(state.cache.start, state.cache.end))
    hidden = expected[1]
    for piece in (slice(0, 11), slice(11, 12)):
        result, *states = advance(state, hidden[:, piece], states=wanted)
        close(result, expected[-1][:, piece])
        for block, got in zip(wanted, states, strict=True):
            close(got, expected[block + 1][:, piece])


def test_any_run_of_blocks_without_a_cache(case: Case) -> None:
    expected = case.states(random_ids(2, 12))
    span = case.spans[1]
    for start in range(span.start, span.end):
        for end in range(start + 1, span.end + 1):
            close(span.run(start, end, expected[start])[0], expected[end])


def test_prompts_are_added_to_every_blocks_input(case: Case) -> None:
    hidden = case.states(random_ids(2, 12))[1]
    span = case.spans[1]
    prompts = torch.randn(span.end - span.start, 1, 8, hidden.shape[2])
    expected = hidden
    for block, prompt in zip(range(span.start, span.end), prompts, strict=True):
        changed = expected.clone()
        changed[:, :8] += prompt
        expected = span.run(block, block + 1, changed)[0]
    close(span.run(span.start, span.end, hidden, prompts=prompts)[0], expected)
    # In a session they belong to the first positions of the sequence, however it is cut.
    state = SessionState(span, context=None)
    for begin, end in ((0, 3), (3, 4), (4, 10), (10, 12)):
        got = advance(state, hidden[:, begin:end], prompts=prompts)[0]
        close(got, expected[:, begin:end])
    close(advance(state, hidden[:, 5:], prompts=prompts, position=5)[0], expected[:, 5:])


def test_no_positions_is_a_step_that_checks_room(case: Case) -> None:
    state, hidden = case.sessions()[0], case.states(random_ids(2, 6))
    assert advance(state, hidden[0][:, :0])[0].shape == (2, 0, 48)
    close(advance(state, hidden[0])[0], hidden[1])


def test_steps_that_do_not_follow_are_refused(case: Case) -> None:
    state = SessionState(case.spans[0], context=20)
    hidden = torch.randn(2, 6, 48)
    advance(state, hidden)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"hidden": hidden, "position": 7}, "start_from_position: 7"),
        ({"hidden": hidden[:1]}, "1 rows, the session has 2"),
        ({"hidden": hidden, "row_ids": [0, 2]}, "hypo_ids: row 2"),
        ({"hidden": torch.randn(2, 15, 48)}, "the model has 20"),
    ]
    for fields, message in refused:
        with pytest.raises(BadRequest, match=message):
            state.check(Step((0, 1), **fields))
    assert state.cache.length == 6


# The others have ALiBi, a sliding window or eager attention, and so always a mask.
@pytest.mark.parametrize("case", ["llama", "qwen3", "olmo2", "gpt_neox"], indirect=True)
def test_decode_without_padding_reaches_the_fast_attention(case: Case) -> None:
    """HF builds no mask, so scaled_dot_product_attention may take its fast kernels."""
    span = case.spans[1]
    state, masks = SessionState(span, context=None), []
    handle = span.layers[0].register_forward_pre_hook(
        lambda _layer, _inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    for length in (5, 1, 1):
        ones = torch.ones(1, length, dtype=torch.int64)
        advance(state, torch.randn(1, length, 48), attention_mask=ones)
    handle.remove()
    assert masks == [None, None, None]


def test_blocks_with_a_state_that_cannot_be_rolled_back_are_refused() -> None:
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=2, **kinds)
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
    with pytest.raises(Unsupported, match="of the kind linear_attention"):
        Span(decoder, "layers", 0)


def test_blocks_compute_in_no_integers(tmp_path: Path) -> None:
    """As libraries pack weights, the first of which may be the first parameter of all."""
    loaded = load_blocks(resolve(tiny_model("llama", tmp_path)), 0, 2, dtype=torch.bfloat16)
    first = next(loaded.layers[0].parameters())
    first.data = torch.zeros(first.shape, dtype=torch.uint8)
    assert Span(loaded.decoder, loaded.layers_name, 0).dtype == torch.bfloat16
