"""Gradients through a real server against the local model's, and what is kept between requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from raw_wire import RawClient, ServerProcess, request
from tiny import tiny_model
from training_wire import Bench, relative, run_blocks

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import protocol

FAMILIES = ("bloom", "gemma3_text", "gpt2", "llama", "qwen3_moe")
START, END, ROWS, LENGTH, PREFIX, HIDDEN = 1, 4, 3, 12, 4, 48
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(request.param, tmp_path_factory.mktemp("models"))
    log = folder.parent / "server.log"
    server = ServerProcess(folder, log, "--blocks", f"{START}:{END}", "--activation-bytes", "8MiB")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.requires_grad_(False)
        server.wait_ready()
        client = RawClient(server.facts["maddrs"])
        yield Bench(model, folder, START, END, server, client)
        client.close()
    finally:
        server.kill()


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


def test_too_much_is_computed_but_not_kept_and_old_gives_way(bench: Bench) -> None:
    case = Case(padded=False, prompted=False, rows=200)
    assert bench.info()["activation_bytes"] == 8 << 20
    bench.forward(case.hidden[:2], keep="small")
    held = bench.info()["activation_bytes_held"]
    close(
        bench.forward(case.hidden, keep="large"), [run_blocks(bench.model, 1, 4, case.hidden)[-1]]
    )
    assert bench.info()["activation_bytes_held"] <= held
    for index in range(3 * (8 << 20) // held if held > 1 << 19 else 0):
        bench.forward(case.hidden[:2], keep=f"more {index}")
        assert bench.info()["activation_bytes_held"] <= 8 << 20


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
def test_refused(bench: Bench, name: str) -> None:
    if bench.model.config.model_type != "llama":
        pytest.skip("the same for every family")
    case = Case(padded=False, prompted=False)
    fields, message = REFUSED[name]
    fields = {"grad": case.grad, **fields}
    with pytest.raises(BadRequest, match=message):
        bench.backward(case.hidden, fields.pop("grad"), **fields)
    close(bench.backward(case.hidden, case.grad), case.expected(bench.model))
