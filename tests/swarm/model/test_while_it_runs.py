"""Code of the user's that runs in the middle of a call: it works as on a local model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.scene import TOLERANCE, Scene, generate

from swarm_notebook.errors import Unsupported


def both(scene: Scene, use: Callable[[Any], list[torch.Tensor]]) -> list[torch.Tensor]:
    """What is made of a remote model and of the local one is equal; returns it."""
    ours, theirs = (use(copy.deepcopy(one)) for one in (scene.remote, scene.reference))
    assert len(ours) == len(theirs) > 0
    for mine, local in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), local.detach(), atol=TOLERANCE, rtol=1e-4)
    return ours


def layers(model: Any) -> Any:
    return model.model.layers


@pytest.mark.works("Hooks: that call the model, or `generate`, themselves")
@torch.no_grad()
def test_a_hook_calls_the_model(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(2, 9)

    def use(model: Any) -> list[torch.Tensor]:
        def hook(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
            handle.remove()
            inner = model(ids[:, :4]).logits.mean()
            tokens = generate(model, ids[:1, :3]).sequences
            return output + inner + tokens.float().mean()

        handle = layers(model)[2].register_forward_hook(hook)
        whole = generate(model, ids)
        plain = model(ids, logits_to_keep=2).logits
        return [whole.sequences, *whole.logits, plain]

    both(tiny_scene, use)


@torch.no_grad()
def test_a_call_that_an_interrupt_has_ended_is_no_outer_one(tiny_scene: Scene) -> None:
    model = copy.deepcopy(tiny_scene.remote)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layers(model)[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.model(tiny_scene.ids(1, 5))
    handle.remove()
    model(tiny_scene.ids(1, 5))
    assert model._runner.calls.here.call is None


@pytest.mark.works("Hooks: registered by hooks further to the front (on embeddings, on the block)")
@torch.no_grad()
def test_a_hook_registers_another(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(2, 9)

    def use(model: Any) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def at_embeddings(*_: Any) -> None:
            first.remove()
            layers(model)[1].register_forward_hook(at_block)
            layers(model)[4].register_forward_hook(lambda _m, _i, output: output * 1.5)
            layers(model)[3].mlp.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))

        def at_block(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
            seen.append(output.clone())
            if len(seen) == 1:
                layers(model)[2].register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
                layers(model)[2].mlp.register_forward_hook(
                    lambda _m, _i, out: seen.append(out.clone())
                )
            return output * 2

        first = model.get_input_embeddings().register_forward_hook(at_embeddings)
        logits = model(ids, logits_to_keep=1).logits
        return [logits, model(ids).logits, *seen]

    assert len(both(tiny_scene, use)) == 2 + 2 * 4


@torch.no_grad()
def test_a_hook_that_comes_too_late_is_refused(tiny_scene: Scene) -> None:
    """The state before block 4 was not asked for, and nothing is wrong without a word."""
    for where in (lambda m: layers(m)[4], lambda m: layers(m)[4].mlp):
        model = copy.deepcopy(tiny_scene.remote)

        def hook(*_: Any, model: Any = model, where: Any = where) -> None:
            where(model).register_forward_hook(lambda *_: None)

        layers(model)[1].register_forward_hook(hook)
        with pytest.raises(Unsupported, match=r"block 4 while the model was running.*block 3"):
            model(tiny_scene.ids(2, 9))
        model(tiny_scene.ids(2, 9))  # it is there from the beginning now


def by_data(output: torch.Tensor) -> None:
    output.data.mul_(0.5)


def by_numpy(output: torch.Tensor) -> None:
    output.detach().numpy()[:, -1] = 3


def by_rows(output: torch.Tensor) -> None:
    output.data[:] = output.data.flip(0)


@pytest.mark.works("Hooks: that write by way of `.data` or numpy")
@pytest.mark.parametrize("write", [by_data, by_numpy, by_rows])
def test_writes_that_torch_does_not_count(
    tiny_scene: Scene, write: Callable[[torch.Tensor], None]
) -> None:
    ids = tiny_scene.ids(2, 9)

    def use(model: Any) -> list[torch.Tensor]:
        layers(model)[2].register_forward_hook(lambda _m, _i, output: write(output))
        with torch.no_grad():
            found = [model(ids).logits, *generate(model, ids, use_cache=True).logits]
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        return [*found, embeds.grad]

    both(tiny_scene, use)
    model = copy.deepcopy(tiny_scene.remote)
    layers(model)[2].mlp.register_forward_hook(lambda _m, _i, output: write(output))
    with torch.no_grad(), pytest.raises(Unsupported, match=r"changes its output.*swarm\.own"):
        model(ids)


def test_states_have_the_dtype_of_a_local_model(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(2, 9)
    seen = []
    for one in (tiny_scene.remote, tiny_scene.reference):
        model = copy.deepcopy(one)
        # From the first time on transformers notes states before a hook that comes later sees them.
        model(ids, output_hidden_states=True)
        layers(model)[2].register_forward_hook(lambda _m, _i, output: output.bfloat16())
        embeds = model.get_input_embeddings()(ids).bfloat16()
        output = model(inputs_embeds=embeds, output_hidden_states=True)
        seen.append([state.dtype for state in (*output.hidden_states, output.logits)])
    assert seen[0] == seen[1]
    assert torch.float32 in seen[0]


@pytest.mark.works("Calls: `torch.autocast` (servers keep their precision)")
def test_autocast(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(2, 9)
    with torch.no_grad():
        exact = tiny_scene.reference(ids, output_hidden_states=True)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (
                model(ids, output_hidden_states=True)
                for model in (tiny_scene.remote, tiny_scene.reference)
            )
    assert ours.logits.dtype == theirs.logits.dtype == torch.bfloat16
    for mine, local, true in zip(
        ours.hidden_states, theirs.hidden_states, exact.hidden_states, strict=True
    ):
        assert mine.dtype == local.dtype
        assert (mine - true).abs().max() <= (local - true).abs().max() + TOLERANCE


def test_what_is_no_hidden_state_is_said(tiny_scene: Scene) -> None:
    model = copy.deepcopy(tiny_scene.remote)
    layers(model)[2].register_forward_hook(lambda _m, _i, output: (output,))
    with pytest.raises(Unsupported, match=r"block 3 is given a tuple.*return a tensor"):
        model(tiny_scene.ids(2, 9))
    for shape in ((9,), (0, 9), (2, 0)):
        with pytest.raises(ValueError, match=r"takes \[batch, length\], with at least one token"):
            tiny_scene.remote(torch.ones(shape, dtype=torch.long))
