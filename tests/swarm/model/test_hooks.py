"""Hooks on remote blocks against the same hooks on the local model, and what they cost.

The matrix: what a hook does, on which block, in which mode. Costs are counted in requests to
servers with one row (a batch goes in groups of rows): reading is free, each change costs one
more request to each server from there on, in the direction of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.pairs import Pair, close

import swarm_notebook as sn
from swarm_notebook.client.passes import backward as backward_module
from swarm_notebook.client.passes import forward as forward_module
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.errors import Unsupported

BLOCKS = 5
FIRST, BOUNDARY, MIDDLE, LAST = 0, 1, 2, BLOCKS - 1
PLACES = [FIRST, BOUNDARY, MIDDLE, LAST]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that are sent, in order: real ones, only counted."""
    sent: list[str] = []
    for module in (forward_module, backward_module):
        real = module.call_with_adapter

        async def counted(
            directory: Any,
            segment: Any,
            adapter: Any,
            rpc: str,
            *rest: Any,
            real: Any = real,
            **how: Any,
        ) -> Any:
            sent.append(rpc.rpartition(".")[2])
            return await real(directory, segment, adapter, rpc, *rest, **how)

        monkeypatch.setattr(module, "call_with_adapter", counted)
    send = Hop.send

    async def counted_send(self: Hop, *step: Any) -> Any:
        sent.append("rpc_inference")
        return await send(self, *step)

    monkeypatch.setattr(Hop, "send", counted_send)
    return sent


@dataclass
class Seen:
    """What the hooks of one model saw, and the handles to remove them."""

    states: list[torch.Tensor] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)


def read(block: Any, seen: Seen) -> None:
    seen.handles.append(
        block.register_forward_hook(lambda m, args, out: seen.states.append(out.detach().clone()))
    )


def read_input(block: Any, seen: Seen) -> None:
    seen.handles.append(
        block.register_forward_pre_hook(
            lambda m, args: seen.states.append(args[0].detach().clone())
        )
    )


def replace(block: Any, seen: Seen) -> None:
    seen.handles.append(block.register_forward_hook(lambda m, args, out: out * 0.5 + 1))


def write_in_place(block: Any, seen: Seen) -> None:
    def hook(module: Any, args: Any, out: torch.Tensor) -> None:
        out.mul_(0.7)

    seen.handles.append(block.register_forward_hook(hook))


def write_into_a_view(block: Any, seen: Seen) -> None:
    def hook(module: Any, args: Any, out: torch.Tensor) -> None:
        out[0][1:3] = 0

    seen.handles.append(block.register_forward_hook(hook))


def replace_input(block: Any, seen: Seen) -> None:
    seen.handles.append(block.register_forward_pre_hook(lambda m, args: (args[0] + 0.3, *args[1:])))


def read_and_replace(block: Any, seen: Seen) -> None:
    read(block, seen)
    replace(block, seen)
    read(block, seen)


def removed(block: Any, seen: Seen) -> None:
    replace(block, seen)
    seen.handles.pop().remove()


def scale_gradient(block: Any, seen: Seen) -> None:
    seen.handles.append(
        block.register_full_backward_hook(lambda m, grad_in, grad_out: (grad_in[0] * 3,))
    )


ACTIONS = [read, read_input, replace, write_in_place, replace_input, read_and_replace, removed]


@contextmanager
def hooked(model: Any, install: Callable[[Any, Seen], None], places: list[int]) -> Iterator[Seen]:
    seen = Seen()
    for place in places:
        install(model.model.layers[place], seen)
    try:
        yield seen
    finally:
        for handle in seen.handles:
            handle.remove()


def ids(rows: int = 2, length: int = 8) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randint(3, 128, (rows, length))


def same_states(ours: Seen, theirs: Seen) -> None:
    assert len(ours.states) == len(theirs.states)
    for mine, local in zip(ours.states, theirs.states, strict=True):
        close(mine, local)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
@torch.no_grad()
@pytest.mark.works("Hooks: read and write hidden states around blocks")
def test_forward(pair: Pair, action: Any, place: int) -> None:
    results = []
    for model in (pair.remote, pair.local):
        with hooked(model, action, [place]) as seen:
            results.append((model(ids()).logits, seen))
    close(results[0][0], results[1][0])
    same_states(results[0][1], results[1][1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", [*ACTIONS, write_into_a_view, scale_gradient])
def test_training(pair: Pair, action: Any, place: int) -> None:
    results = []
    for model in (pair.remote, pair.local):
        embeds = model.get_input_embeddings()(ids()).detach().requires_grad_()
        # An in-place write needs a tensor that is no leaf, as in every model that trains.
        with hooked(model, action, [place]) as seen:
            logits = model(inputs_embeds=embeds * 1.0).logits
            logits.square().mean().backward()
        results.append((embeds.grad, logits, seen))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    same_states(results[0][2], results[1][2])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ACTIONS)
def test_generate(pair: Pair, action: Any, place: int) -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    results = []
    for model in (pair.remote, pair.local):
        with hooked(model, action, [place]) as seen:
            results.append((model.generate(ids(1), **options), seen))
    assert results[0][0].tolist() == results[1][0].tolist()
    same_states(results[0][1], results[1][1])


@pytest.mark.works("Gradients: at hidden states in between (`retain_grad`, tensor hooks)")
def test_gradients_at_intermediate_states(pair: Pair) -> None:
    """Auxiliary losses, retain_grad, tensor hooks, a second backward through the same graph."""
    results = []
    for model in (pair.remote, pair.local):
        kept: dict[int, torch.Tensor] = {}

        def keep(index: int, kept: dict = kept) -> Any:
            def hook(module: Any, args: Any, out: torch.Tensor) -> None:
                out.retain_grad()
                if index == 3:
                    out.register_hook(lambda grad: grad * 2)
                kept[index] = out

            return hook

        layers = model.model.layers
        handles = [layers[i].register_forward_hook(keep(i)) for i in (0, 2, 3)]
        embeds = model.get_input_embeddings()(ids()).detach().requires_grad_()
        logits = model(inputs_embeds=embeds).logits
        loss = logits.square().mean() + kept[2].square().mean() + kept[0].abs().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        for handle in handles:
            handle.remove()
        results.append([embeds.grad, *(kept[i].grad for i in (0, 2, 3))])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.refused(
    "Gradients: of gradients (`create_graph=True`)",
    "bring the blocks home: `swarm.own(slice(None))`",
)
def test_gradients_of_gradients_raise(pair: Pair) -> None:
    embeds = pair.remote.get_input_embeddings()(ids()).detach().requires_grad_()
    loss = pair.remote(inputs_embeds=embeds).logits.square().mean()
    with pytest.raises(Unsupported, match=r"create_graph=True.*swarm\.own"):
        torch.autograd.grad(loss, embeds, create_graph=True)


@torch.no_grad()
def test_reading_costs_nothing_and_writing_one_trip(pair: Pair, requests: list[str]) -> None:
    def cost(action: Any, places: list[int]) -> int:
        requests.clear()
        with hooked(pair.remote, action, places):
            pair.remote(ids(1))
        return len(requests)

    servers = 2
    assert cost(removed, [MIDDLE]) == servers
    assert cost(read, list(range(BLOCKS))) == servers
    assert cost(read_input, list(range(BLOCKS))) == servers
    # From the changed block on, the chain is asked once more: here only its second server.
    assert cost(replace, [MIDDLE]) == servers + 1
    assert cost(replace, [FIRST]) == servers + 2
    assert cost(replace, [LAST]) == servers
    requests.clear()
    pair.remote(ids(1), output_hidden_states=True)
    assert len(requests) == servers


def test_reading_costs_nothing_in_backward(pair: Pair, requests: list[str]) -> None:
    def cost(loss_of: Any) -> int:
        embeds = pair.remote.get_input_embeddings()(ids(1)).detach().requires_grad_()
        with hooked(pair.remote, read, list(range(BLOCKS))):
            output = pair.remote(inputs_embeds=embeds, output_hidden_states=True)
        loss = loss_of(output)
        requests.clear()
        loss.backward()
        return len(requests)

    servers = 2
    assert cost(lambda output: output.logits.sum()) == servers
    # A loss on an inner state adds a gradient there: asked again from there down.
    assert cost(lambda o: o.logits.sum() + o.hidden_states[2].square().sum()) == servers + 1


def test_generate_with_reading_hooks_sends_one_request_per_server_and_token(
    pair: Pair, requests: list[str]
) -> None:
    with hooked(pair.remote, read, list(range(BLOCKS))):
        pair.remote.generate(ids(1), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert requests == ["rpc_inference"] * 2 * 4


@torch.no_grad()
@pytest.mark.works("Hooks: read outputs of modules inside remote blocks")
def test_modules_inside_blocks_can_be_read(pair: Pair, requests: list[str]) -> None:
    names = ["self_attn.o_proj", "mlp", "mlp.gate_proj", "input_layernorm"]
    results = []
    for model in (pair.remote, pair.local):
        seen = Seen()
        for place in (0, 3):
            for name in names:
                read(model.model.layers[place].get_submodule(name), seen)
        requests.clear()
        model(ids(1))
        for handle in seen.handles:
            handle.remove()
        if model is pair.remote:
            assert len(requests) == 2
        results.append(sorted(seen.states, key=lambda state: state.sum().item()))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.refused(
    "Gradients: at outputs of modules inside remote blocks (`retain_grad`)", "`swarm.own(block)`"
)
@pytest.mark.parametrize(
    "wait", [torch.Tensor.retain_grad, lambda state: state.register_hook(torch.clone)]
)
def test_gradients_inside_of_blocks(pair: Pair, wait: Any) -> None:
    """They never come: said in the backward pass, instead of a gradient that stays None."""
    seen: list[torch.Tensor] = []
    mlp = pair.remote.model.layers[3].mlp
    handle = mlp.register_forward_hook(lambda _m, _i, output: seen.append(output))
    embeds = pair.remote.get_input_embeddings()(ids()).detach().requires_grad_()
    loss = pair.remote(inputs_embeds=embeds).logits.square().mean()
    handle.remove()
    loss.backward(retain_graph=True)
    wait(seen[0])
    with pytest.raises(Unsupported, match=r"at the output of block 3\.mlp.*swarm\.own"):
        loss.backward()


@torch.no_grad()
def test_attention_modules_return_what_they_return_locally(pair: Pair) -> None:
    found: list[Any] = []
    for model in (pair.remote, pair.local):
        module = model.model.layers[3].self_attn
        handle = module.register_forward_hook(lambda _m, _i, output: found.append(output))
        model(ids(2))
        handle.remove()
    ours, theirs = found
    assert isinstance(ours, tuple)
    assert len(ours) == len(theirs)
    close(ours[0], theirs[0])
    assert ours[1] is theirs[1] is None


@pytest.mark.parametrize(
    "read_inputs",
    [
        lambda _m, args, _kw, _o: args[0],
        lambda _m, args, _kw, _o: len(args),
        lambda _m, args, _kw, _o: list(args),
        lambda _m, _args, kwargs, _o: kwargs["hidden_states"],
        lambda _m, _args, kwargs, _o: kwargs.get("hidden_states"),
    ],
)
@pytest.mark.refused(
    "Hooks: read inputs of modules inside remote blocks",
    "hook the module before it, or `swarm.own(block)`",
)
def test_inputs_inside_blocks_are_not_read_as_empty(
    pair: Pair, read_inputs: Callable[..., Any]
) -> None:
    module = pair.remote.model.layers[3].self_attn
    with (
        module.register_forward_hook(read_inputs, with_kwargs=True),
        pytest.raises(sn.errors.Unsupported, match=r"reads the module's inputs.*swarm\.own"),
    ):
        pair.remote(ids(1))


@pytest.mark.refused("Hooks: write inside remote blocks", "hook the block, or `swarm.own(block)`")
def test_writes_inside_blocks_are_refused(pair: Pair) -> None:
    inner = pair.remote.model.layers[1].mlp
    for method in ("register_forward_pre_hook", "register_full_backward_hook"):
        with pytest.raises(sn.errors.Unsupported, match=r"block 1.mlp.*hook the block itself"):
            getattr(inner, method)(lambda *args: None)
    with (
        inner.register_forward_hook(lambda module, args, out: out + 1),
        pytest.raises(sn.errors.Unsupported, match=r"changes its output"),
    ):
        pair.remote(ids(1))
