"""Weights inside of remote blocks are read as they are; a write is refused, with the way out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.utils.dlpack
from support.pairs import Pair, pair_of
from support.tiny import tiny_model
from torch import nn
from torch.nn.utils import prune as pruning

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts import single
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.blocks.placeholders import RemoteParameter


def weights(pair: Pair) -> tuple[Any, Any]:
    """The same weight of both models."""
    both = (pair.remote, pair.local)
    remote, local = (model.model.layers[3].mlp.down_proj.weight for model in both)
    return remote, local


@pytest.fixture
def pair(fresh_pair: Pair) -> Pair:
    return fresh_pair


def tokens() -> torch.Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


READS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda weight: weight.norm(),
    "linalg": torch.linalg.svdvals,
    "numpy": lambda weight: torch.from_numpy(weight.numpy().copy()),
    "asarray": lambda weight: torch.from_numpy(np.asarray(weight).copy()),
    "data": lambda weight: weight.data.clone(),
    "detach": lambda weight: weight.detach()[0],
    "sum": lambda weight: weight + 1,
    "reflected": lambda weight: 1 - weight,
    "product": lambda weight: weight.T @ weight,
    "tolist": lambda weight: torch.tensor(weight.tolist()),
    "deepcopy": lambda weight: copy.deepcopy(weight).sum(),
    "dtype": lambda weight: weight.double().mean(),
    "half": lambda weight: weight.to(torch.bfloat16),
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)).data,
    "copied": lambda weight: torch.zeros(48, 80).copy_(weight),
    "text": lambda weight: torch.tensor(list(str(weight).encode())),
    "cat": lambda weight: torch.cat([weight, weight]),
    "linear": lambda weight: nn.functional.linear(torch.ones(1, 80), weight),
    "item": lambda weight: torch.tensor(weight[2, 3].item()),
    "rows": lambda weight: list(weight)[7],
    "flat": lambda weight: weight.cpu().contiguous().view(-1)[5:9],
    "parameter": lambda weight: nn.Parameter(weight.clone(), requires_grad=False).data,
    "like": torch.zeros_like,
    "row": lambda weight: weight[3].square().cumsum(0),
    "changed copy": lambda weight: weight[3].clone().mul_(2),
    "row in place": lambda weight: torch.zeros(80).add_(weight[3]),
    "pickled row": lambda weight: pickle.loads(pickle.dumps(weight[3:5])),
    "deepcopied row": lambda weight: copy.deepcopy(weight[3]).zero_(),
    "text of a row": lambda weight: torch.tensor(list(str(weight[3]).encode())),
    "gradient": lambda weight: gradient(weight[3]),
    # Of these torch asks no tensor subclass: they go straight for the values.
    "tensor": lambda weight: torch.tensor(weight.detach()),
    "new tensor": lambda weight: torch.ones(1).new_tensor(weight.detach()),
    "old constructor": lambda weight: torch.Tensor(weight.detach()),
    "plain class": lambda weight: torch.Tensor._make_subclass(torch.Tensor, weight),
    "as subclass": lambda weight: weight.as_subclass(torch.Tensor).sum(),
    "set": lambda weight: torch.zeros(1).set_(weight.detach()),
    "traced": torch.jit.trace(lambda x: 2 * x, torch.ones(1)),
    "vmap": lambda weight: torch.func.vmap(torch.sum)(weight.detach()),
    # Each conversion rounds, also where the next one has room for more.
    "rounded": lambda weight: weight - weight.bfloat16().float(),
    "rounded twice": lambda weight: weight.to(torch.bfloat16).half().double(),
    "whole numbers": lambda weight: (
        (10 * weight).data.to(torch.int8) + weight.to(torch.int8).half()
    ),
    "func.grad": lambda weight: torch.func.grad(lambda x: (x * weight).sum())(torch.ones(80)),
}


def gradient(row: Any) -> Any:
    row.requires_grad_()
    row.square().sum().backward()
    return row.grad


def test_an_array_of_values_is_read_only(pair: Pair) -> None:
    array = weights(pair)[0].numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.works("Weights: read inside remote blocks")
def test_values_are_read(pair: Pair, read: Callable[[Any], Any]) -> None:
    remote, local = weights(pair)
    assert torch.equal(read(remote), read(local))
    assert remote.untyped_storage().nbytes() == 4  # nothing is kept


def test_shapes_cost_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(single.BlockTensors, "read", fail)
    remote, local = weights(pair)
    for ask in (
        lambda one: (one.shape, one.dtype, one.device, one.ndim, one.numel(), len(one)),
        lambda one: (one.size(0), one.dim(), one.element_size(), one.nbytes, one.is_contiguous()),
        lambda one: (one.stride(), one.stride(0), one.storage_offset(), one.half().stride()),
        lambda one: (one.requires_grad, one.grad, one.is_leaf, isinstance(one, nn.Parameter)),
        lambda one: (one.is_floating_point(), one.is_meta, one.layout, one.to("cpu").shape),
        lambda one: (torch.empty_like(one).shape, one.new_zeros(3).dtype, one.half().dtype),
    ):
        assert ask(remote) == ask(local)
    moved = copy.deepcopy(pair.remote).to(torch.bfloat16).eval().requires_grad_(False)
    assert moved.num_parameters() == pair.local.num_parameters()
    assert moved.model.layers[3].mlp.down_proj.weight.dtype == torch.bfloat16
    assert moved.model.layers[3].mlp.down_proj.weight.untyped_storage().nbytes() == 2
    torch.optim.AdamW(pair.remote.parameters()).zero_grad()


def test_a_converted_model_reads_as_it_was_rounded(pair: Pair) -> None:
    for model in (pair.remote, pair.local):
        model.half()
        model.float()
    remote, local = weights(pair)
    assert torch.equal(remote.clone(), local)
    assert torch.equal(remote.double(), local.double())


def test_a_pickled_module_has_parameters(pair: Pair) -> None:
    both = [model.model.layers[3].mlp.down_proj for model in (pair.remote, pair.local)]
    ours, theirs = (pickle.loads(pickle.dumps(module)) for module in both)
    assert type(ours.weight) is nn.Parameter
    assert ours.weight.requires_grad is theirs.weight.requires_grad is False
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "gemma3_text"])
def test_families(family: str, tmp_path: Path) -> None:
    """Weights that transformers joins while it loads them, and buffers."""
    folder = tiny_model(family, tmp_path)
    count = resolve(folder).config().num_hidden_layers
    with pair_of(folder, [(0, count)]) as pair:
        theirs = dict(pair.local.named_parameters())
        ours = {
            name: one
            for name, one in pair.remote.named_parameters()
            if isinstance(one, RemoteParameter)
        }
        assert len(ours) > count
        for name, parameter in ours.items():
            if ".1." in name:
                assert torch.equal(parameter.clone(), theirs[name]), name


@pytest.mark.refused(
    "Weights: memory of weights inside remote blocks (`data_ptr`, safetensors' `save_file`)",
    "`weight.clone()`, or `swarm.own(block)`",
)
def test_memory_that_is_not_there_is_not_read(pair: Pair) -> None:
    """Who goes by addresses would read what lies beside it, or zeros."""
    remote, local = weights(pair)
    for ask in (
        lambda weight: weight.data_ptr(),
        lambda weight: weight.storage(),
        lambda weight: bytes(weight.untyped_storage()),
        lambda weight: weight.detach().untyped_storage().tolist(),
        lambda weight: safetensors.torch.save({"weight": weight}),
    ):
        with pytest.raises(Unsupported, match=r"block 3 has no memory.*clone\(\).*own\(3\)"):
            ask(remote)
    other = torch.zeros(48, 80)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.data = remote
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(remote)
    saved = safetensors.torch.save({"weight": remote.clone()})
    assert torch.equal(safetensors.torch.load(saved)["weight"], local)
    storages = {one.untyped_storage().data_ptr() for one in pair.remote.parameters()}
    assert len(storages) == len({id(one) for one in pair.remote.parameters()})


def set_data(weight: Any) -> None:
    weight.data = torch.zeros(48, 80)


def set_item(weight: Any) -> None:
    weight[0] = 1


def add_in_place(weight: Any) -> None:
    weight += 1


def require_grad(weight: Any) -> None:
    weight.requires_grad = True


def a_row_of_data(weight: Any) -> None:
    weight.data[0] *= 0


def each_row(weight: Any) -> None:
    for row in weight:
        row.zero_()


WRITES: list[Callable[[Any], Any]] = [
    a_row_of_data,
    each_row,
    lambda weight: weight[3].copy_(torch.zeros(80)),
    lambda weight: weight.data.reshape(-1).scatter_add_(0, torch.tensor([2]), torch.ones(1)),
    lambda weight: weight.T[2:].view_as(weight.T[2:]).detach().mul_(2),
    lambda weight: weight.chunk(2)[1].fill_(0),
    lambda weight: nn.init.zeros_(weight[:4]),
    lambda weight: torch.neg(weight[0], out=weight[0]),
    set_data,
    set_item,
    add_in_place,
    require_grad,
    lambda weight: weight.copy_(torch.zeros(48, 80)),
    lambda weight: weight.data.mul_(2),
    lambda weight: weight.detach().zero_(),
    lambda weight: weight.requires_grad_(),
    nn.init.normal_,
    lambda weight: torch.add(torch.zeros(48, 80), 1, out=weight),
    lambda weight: torch._foreach_mul_([weight], 2),
    lambda weight: weight.set_(torch.zeros(48, 80)),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.refused("Weights: written inside remote blocks", "`swarm.own(block)`")
def test_writes_are_refused(pair: Pair, write: Callable[[Any], Any]) -> None:
    weight, local = weights(pair)
    with pytest.raises(Unsupported, match=r"mlp\.down_proj\.weight of block 3.*swarm\.own\(3\)"):
        write(weight)
    assert torch.equal(weight.clone(), local)
    assert not weight.requires_grad


def exchange_a_module(model: Any) -> None:
    model.model.layers[3].mlp = nn.Linear(48, 48)


def patch_a_forward(model: Any) -> None:
    model.model.layers[3].self_attn.forward = lambda *_args, **_kwargs: None


def exchange_an_activation(model: Any) -> None:
    model.model.layers[3].mlp.act_fn = nn.ReLU()


def wrap_a_projection(model: Any) -> None:
    attention = model.model.layers[3].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)


def change_a_number(model: Any) -> None:
    model.model.layers[3].self_attn.scaling = 0.1


def exchange_a_parameter(model: Any) -> None:
    model.model.layers[3].mlp.up_proj.weight = nn.Parameter(torch.zeros(80, 48))


def parametrize(model: Any) -> None:
    linear = model.model.layers[3].mlp.up_proj
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())


def normalise(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[3].mlp.up_proj)


def prune(model: Any) -> None:
    pruning.l1_unstructured(model.model.layers[3].mlp.up_proj, "weight", amount=0.3)


def add_a_module(model: Any) -> None:
    model.model.layers[3].mlp.add_module("extra", nn.Identity())


CHANGES = [
    exchange_a_module,
    patch_a_forward,
    exchange_an_activation,
    wrap_a_projection,
    change_a_number,
    exchange_a_parameter,
    parametrize,
    normalise,
    prune,
    add_a_module,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
@pytest.mark.refused("Weights: modules exchanged inside remote blocks", "`swarm.own(block)`")
def test_what_is_exchanged_is_refused(pair: Pair, change: Callable[[Any], None]) -> None:
    twin = copy.deepcopy(pair.remote)

    def use_changed() -> None:
        change(twin)
        twin(tokens())

    with pytest.raises(Unsupported, match=r"block 3.*servers.*swarm\.own\(3\)"):
        use_changed()
    with torch.no_grad():
        torch.testing.assert_close(pair.remote(tokens()).logits, pair.local(tokens()).logits)


def test_a_change_in_the_middle_of_a_text_is_refused(pair: Pair) -> None:
    with torch.no_grad():
        cache = pair.remote(tokens(), use_cache=True).past_key_values
        exchange_a_module(pair.remote)
        with pytest.raises(Unsupported, match="mlp was replaced"):
            pair.remote(tokens()[:, :1], past_key_values=cache)


@pytest.mark.refused(
    "Weights: `load_state_dict` with weights of remote blocks",
    "leave them out, or `swarm.own(block)`",
)
def test_a_state_dict_with_blocks_is_refused(pair: Pair) -> None:
    state = pair.local.state_dict()
    with pytest.raises(Unsupported, match=r"model\.layers\.0\..*swarm\.own\(0\)"):
        pair.remote.load_state_dict(state)
    pair.remote.load_state_dict(pair.remote.state_dict())  # as on every model


def test_kbit_training_takes_no_memory(pair: Pair) -> None:
    peft = pytest.importorskip("peft")
    twin = peft.prepare_model_for_kbit_training(copy.deepcopy(pair.remote).to(torch.bfloat16))
    weight = twin.model.layers[3].mlp.down_proj.weight
    assert weight.dtype == torch.float32
    assert weight.untyped_storage().nbytes() == 4
    assert twin(tokens()).logits.isfinite().all()
