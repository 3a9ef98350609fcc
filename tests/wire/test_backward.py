"""Gradients through a real server against the local model's, and what is kept between requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bench import Bench, layers_of, relative, run_blocks
from support.patience import wait_until
from support.raw_wire import request

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import protocol
from swarm_notebook.server.engine.scheduling import scheduler

START, END, ROWS, LENGTH, PREFIX, HIDDEN = 1, 4, 3, 12, 4, 48
TOLERANCE = 1e-4


class Case:
    """Random inputs and gradients; rows padded on the left if ``padded``."""

    def __init__(self, padded: bool, prompted: bool, rows: int = ROWS):
        generator = torch.Generator().manual_seed(rows + 2 * padded)
        self.hidden = torch.randn(rows, LENGTH, HIDDEN, generator=generator)
        self.grad = torch.randn(rows, LENGTH, HIDDEN, generator=generator)
        self.mask: torch.Tensor | None = None
        self.prompts: torch.Tensor | None = None
        if padded:
            self.mask = torch.ones(rows, LENGTH, dtype=torch.int64)
            for row in range(rows):
                self.mask[row, : 2 * row] = 0
            self.grad *= self.mask[:, :, None]
        if prompted:
            self.prompts = torch.randn(END - START, rows, PREFIX, HIDDEN, generator=generator)

    def slots(self, *, back: bool) -> list[torch.Tensor | None]:
        mask = None if self.mask is None else self.mask.to(torch.uint8)
        ahead = [self.hidden, self.grad] if back else [self.hidden]
        return [*ahead, self.prompts, mask]

    def expected(
        self, model: Any, start: int = START, end: int = END, states: tuple[int, ...] = ()
    ) -> list[torch.Tensor]:
        """The local gradients, in the order of a server's answer."""
        sources = [self.hidden.clone().requires_grad_()]
        prompts = self.prompts
        if prompts is not None:
            prompts = prompts[start - START : end - START].clone().requires_grad_()
            sources.append(prompts)
        outputs = run_blocks(
            model, start, end, sources[0], prompts=prompts, attention_mask=self.mask
        )
        sources += [outputs[index - start] for index in states]
        return list(torch.autograd.grad(outputs[-1], sources, self.grad))


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) < TOLERANCE


@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "prompts"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gradients_computed_anew_and_from_what_was_kept(
    bench: Bench, padded: bool, prompted: bool
) -> None:
    wait_until(lambda: bench.info()["activation_bytes_held"] == 0, "others' activations go", 0.5)
    case, states = Case(padded, prompted), (1, 2)
    expected = case.expected(bench.model, states=states)
    close(bench.backward(*case.slots(back=True), states=states), expected)
    bench.forward(*case.slots(back=False), keep="one", states=[1])
    held = bench.info()["activation_bytes_held"]
    assert held > 0
    for _ in range(2):
        close(bench.backward(*case.slots(back=True), states=states, kept="one"), expected)
    assert bench.info()["activation_bytes_held"] == held
    got = bench.backward(*case.slots(back=True), states=states, kept="one", release=True)
    close(got, expected)
    assert bench.info()["activation_bytes_held"] == 0
    close(bench.backward(*case.slots(back=True), states=states, kept="one"), expected)


def test_some_of_the_blocks_and_of_what_was_kept_of_all(bench: Bench) -> None:
    case = Case(padded=False, prompted=False)
    bench.forward(case.hidden, keep="all")
    part = bench.backward(case.hidden, case.grad, blocks=(START, END - 1), kept="all")
    close(part, case.expected(bench.model, end=END - 1))
    second = run_blocks(bench.model, START, START + 1, case.hidden)[0]
    rest = bench.backward(second, case.grad, blocks=(START + 1, END), kept="all", release=True)
    case.hidden = second
    close(rest, case.expected(bench.model, start=START + 1))


def test_modules_inside_blocks(bench: Bench) -> None:
    """Their outputs come in the order of the request, from any kind of pass."""
    case, layers = Case(padded=True, prompted=False), layers_of(bench.model)
    attention = next(name for name, _ in layers[1].named_children() if "att" in name)
    projection = next(
        name
        for name, module in layers[1].named_modules()
        if name.startswith(f"{attention}.")
        and getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
    )
    wanted = [(3, projection), (1, attention), (2, "mlp")]
    seen: dict[tuple[int, str], torch.Tensor] = {}
    handles = [
        layers[index]
        .get_submodule(name)
        .register_forward_hook(
            lambda _module, _inputs, output, key=(index, name): seen.update(
                {key: output[0] if isinstance(output, tuple) else output}
            )
        )
        for index, name in wanted
    ]
    run_blocks(bench.model, START, END, case.hidden, attention_mask=case.mask)
    for handle in handles:
        handle.remove()
    expected = [seen[key].detach() for key in wanted]
    inner = [list(key) for key in wanted]
    for options in ({}, {"keep": "inner"}):
        got = bench.forward(*case.slots(back=False), states=[1], inner=inner, **options)
        close(got[2:], expected)
    session = bench.client.run(bench.client.session(bench.server.peer))
    uid = protocol.uid_chain(bench.folder.name, START, END)
    mask = case.slots(back=False)[-1]
    steps = []
    for piece in (slice(0, 9), slice(9, 12)):
        slots = [case.hidden[:, piece], None, None, mask[:, piece]]
        steps.append(bench.client.run(session.step(uid, *slots, max_length=20, inner=inner)))
    session.close()
    real = case.mask.bool()
    for first, second, whole in zip(steps[0][1:], steps[1][1:], expected, strict=True):
        assert relative(torch.cat([first, second], dim=1)[real], whole[real]) < TOLERANCE


INNER_REFUSED = {
    "a block that is not here": [[0, "mlp"]],
    "no such module": [[1, "mlp.none"]],
    "a hidden attribute": [[1, "__class__"]],
    "no name": [[1, ""]],
    "twice": [[1, "mlp"], [1, "mlp"]],
    "no pair": [[1]],
    "does not run": [[1, "self_attn.q_proj.none"]],
}


@pytest.mark.parametrize("name", INNER_REFUSED)
def test_inner_refused(llama: Bench, name: str) -> None:
    with pytest.raises(BadRequest, match="inner"):
        llama.forward(torch.zeros(1, 2, HIDDEN), inner=INNER_REFUSED[name])


def test_petals_unary_requests(bench: Bench) -> None:
    case = Case(padded=False, prompted=True)
    expected = case.expected(bench.model)
    uid = protocol.uid_chain(bench.folder.name, START, END)
    message = request(uid, case.hidden, case.grad, case.prompts, active_adapter=None)
    close(bench.unary(protocol.RPC_BACKWARD, message), expected)
    shared = case.prompts[:, :1]  # a prompt for all rows: still one gradient per row
    case.prompts = shared.expand(-1, ROWS, -1, -1)
    message = request(uid, case.hidden, case.grad, shared)
    close(bench.unary(protocol.RPC_BACKWARD, message), case.expected(bench.model))


def test_forward_with_prompts_and_states_is_the_same_kept_or_not(bench: Bench) -> None:
    case = Case(padded=True, prompted=True)
    with torch.no_grad():
        local = run_blocks(
            bench.model, START, END, case.hidden, prompts=case.prompts, attention_mask=case.mask
        )
    for options in ({}, {"keep": "this"}):
        got = bench.forward(*case.slots(back=False), states=[2, 1, 3], **options)
        close(got, [local[-1], local[1], local[0], local[2]])


def test_old_gives_way_and_too_much_is_computed_but_not_kept(
    llama: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In one piece: each cut holds two kilobytes more, and a busy machine makes more of them.
    for bound in ("FIRST_CHUNK", "MIN_PIECE"):
        monkeypatch.setattr(scheduler, bound, scheduler.MAX_PIECE)
    case, budget = Case(padded=False, prompted=False, rows=20), 8 << 20
    assert llama.info()["activation_bytes"] == budget
    held = []
    for index in range(12):
        llama.forward(case.hidden, keep=str(index))
        held.append(llama.info()["activation_bytes_held"])
    one = held[1] - held[0]
    assert held[-1] == budget // one * one  # of this test only, and as many as there is room for
    assert max(held) <= budget
    large = torch.cat([case.hidden] * (budget // one + 1))
    expected = run_blocks(llama.model, START, END, large)[-1]
    for _ in range(2):
        close(llama.forward(large, keep="large"), [expected])
        assert llama.info()["activation_bytes_held"] <= budget


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no gradient": ({"grad": None}, "gradient: nothing"),
    "gradient of another shape": ({"grad": torch.zeros(ROWS, 3, HIDDEN)}, "gradient: shape"),
    "gradient of NaN": ({"grad": torch.full((ROWS, LENGTH, HIDDEN), torch.nan)}, "NaN"),
    "a state that is no boundary": ({"states": [END - 1]}, "what the request brings"),
    "a state outside": ({"states": [0]}, "states"),
    "a kept id of no text": ({"kept": 3}, "kept"),
    "release of no flag": ({"release": "yes"}, "release"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(llama: Bench, name: str) -> None:
    case = Case(padded=False, prompted=False)
    fields, message = REFUSED[name]
    fields = {"grad": case.grad, **fields}
    with pytest.raises(BadRequest, match=message):
        llama.backward(case.hidden, fields.pop("grad"), **fields)
    close(llama.backward(case.hidden, case.grad), case.expected(llama.model))
