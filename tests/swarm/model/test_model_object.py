"""The remote model as an object: what it holds, how it is moved, copied and run (contract C1)."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import infer_auto_device_map
from support.pairs import close
from support.scene import Scene, generate
from torch import nn

from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.placeholders import is_placeholder


def memory(model: Any) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in {s.data_ptr(): s for s in storages}.values())


@pytest.mark.refused(
    "The model: `state_dict()` lacks the weights of remote blocks, which a warning says",
    "the checkpoint itself, or `swarm.own(slice(None))`",
)
def test_the_state_dict_holds_what_is_here(tiny_scene: Scene) -> None:
    with pytest.warns(UserWarning, match=r"blocks 0:5 are on servers.*swarm\.own"):
        state = tiny_scene.remote.state_dict()
    whole = tiny_scene.reference.state_dict()
    assert sorted(state) == sorted(name for name in whole if ".layers." not in name)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, whole[name])


def test_whatever_is_asked_for_a_state_dict_says_what_it_lacks(
    tiny_scene: Scene, tmp_path: Path
) -> None:
    model = copy.deepcopy(tiny_scene.remote)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    layers = model.model.layers
    for module, told in (
        (layers[3], r"block 3 are on servers and left out.*swarm\.own\(3\)"),
        (layers[1:3], r"blocks 1:3 are on servers.*swarm\.own\(slice\(None\)\)"),
        (nn.ModuleDict({"inner": tuned}), "blocks 0:5 are on servers"),
        (tuned, "blocks 0:5 are on servers"),
    ):
        with pytest.warns(UserWarning, match=f"^state_dict: the weights of {told}") as warned:
            state = module.state_dict()
        assert [one.filename for one in warned] == [__file__]
        assert all("lora" in name for name in state if "layers." in name or module is layers[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.save_pretrained(tmp_path)  # it has all that it saves


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_it_begins_as_little_anew_as_a_model_that_was_loaded(tiny_scene: Scene, own: bool) -> None:
    ids = tiny_scene.ids(2, 9)
    if own:
        tiny_scene.swarm.own(1)
    try:
        model = copy.deepcopy(tiny_scene.remote)
        model.post_init()
        model.init_weights()
        model.tie_weights()
        close(model(ids).logits, tiny_scene.reference(ids).logits)
    finally:
        tiny_scene.swarm.release()


def test_a_block_is_no_file(tiny_scene: Scene) -> None:
    for module in (tiny_scene.remote.model.layers[1], tiny_scene.remote):
        with pytest.raises(Unsupported, match="cannot be pickled; save its adapter"):
            pickle.dumps(module)
    block = tiny_scene.remote.model.layers[1]
    assert copy.copy(block).mlp is block.mlp


@pytest.mark.works("Tools: accelerate's `infer_auto_device_map`")
@pytest.mark.parametrize("whole", [True, False])
def test_accelerate_divides_it_as_it_divides_a_local_one(tiny_scene: Scene, whole: bool) -> None:
    maps = []
    for model in (tiny_scene.remote, tiny_scene.reference):
        options = {"no_split_module_classes": model._no_split_modules} if whole else {}
        memory: dict[int | str, int | str] = {0: 150_000, 1: 150_000, "cpu": 10**9}
        maps.append(infer_auto_device_map(model, memory, **options))
    assert maps[0] == maps[1]
    assert len(set(maps[0].values())) == 3
    assert whole is not any("mlp" in name for name in maps[0])


@pytest.mark.refused(
    "The model: `save_pretrained` of a model in which nothing was trained",
    "the checkpoint itself, or the PEFT model's `save_pretrained`",
)
def test_there_is_nothing_to_save(tiny_scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"PEFT adapter works.*swarm\.own\(block\)"):
        tiny_scene.remote.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_moving_to_another_dtype_takes_no_memory_for_blocks(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(1, 9)
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.cpu()):
        model = convert(copy.deepcopy(tiny_scene.remote))
        blocks = [p for p in model.model.layers.parameters() if p.numel() > 1]
        assert all(is_placeholder(parameter) for parameter in blocks)
        assert {parameter.dtype for parameter in blocks} == {model.dtype}
        assert memory(model.model.layers) <= 16 * len(blocks)
        assert generate(model, ids).logits[0].isfinite().all()


@torch.no_grad()
@pytest.mark.works("The model: `copy.deepcopy` (another view on the same servers)")
def test_a_copy_is_another_view_on_the_same_servers(tiny_scene: Scene) -> None:
    """Its hooks and local weights are its own."""
    ids = tiny_scene.ids(2, 9)
    twin = copy.deepcopy(tiny_scene.remote)
    theirs = tiny_scene.reference(ids, output_hidden_states=True)
    close(twin(ids).logits, theirs.logits)
    tiny_scene.same(generate(twin, ids), generate(tiny_scene.reference, ids))

    seen: list[torch.Tensor] = []
    twin.model.layers[2].register_forward_hook(lambda _m, _i, output: seen.append(output))
    twin.lm_head.weight.zero_()
    assert not twin(ids).logits.any()
    close(seen[0], theirs.hidden_states[3])
    close(tiny_scene.remote(ids).logits, theirs.logits)
    assert len(seen) == 1


def test_inference_mode(tiny_scene: Scene) -> None:
    ids = tiny_scene.ids(2, 9)
    with torch.inference_mode():
        first = tiny_scene.remote(ids, use_cache=True)
        ours = tiny_scene.remote(ids[:, :3], past_key_values=first.past_key_values).logits
        tiny_scene.same(generate(tiny_scene.remote, ids), generate(tiny_scene.reference, ids))
    with torch.no_grad():
        theirs = tiny_scene.reference(torch.cat([ids, ids[:, :3]], dim=1)).logits
    close(first.logits, theirs[:, :9])
    close(ours, theirs[:, 9:])
