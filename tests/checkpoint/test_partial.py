"""What `load_blocks` and `load_edges` give, against the whole model, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm_notebook.checkpoint.partial import load_blocks, load_edges
from swarm_notebook.checkpoint.source import resolve
from tests.tiny import FAMILIES, tiny_model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def _whole(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_chain_of_spans_is_the_model(folder: Path, ids: torch.Tensor) -> None:
    source = resolve(folder)
    states = _whole(folder)(ids, output_hidden_states=True, use_cache=False).hidden_states
    count = source.config().num_hidden_layers
    hidden = states[0]
    for start, end in [(0, 1), (1, count - 1), (count - 1, count)]:
        blocks = load_blocks(source, start, end, dtype=torch.float32)
        assert len(blocks.layers) == blocks.config.num_hidden_layers == end - start
        hidden = blocks.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        if end < count:  # the last state of transformers is behind the final norm
            assert torch.equal(hidden, states[end])
    whole = load_blocks(source, 0, count, dtype=torch.float32)
    chained = whole.model(inputs_embeds=states[0], use_cache=False).last_hidden_state
    assert torch.equal(hidden, chained)


@torch.no_grad()
def test_edges_with_real_blocks_are_the_model(folder: Path, ids: torch.Tensor) -> None:
    source = resolve(folder)
    whole = _whole(folder)
    model, info = load_edges(source, dtype=torch.float32)
    assert type(model) is type(whole)
    assert info.num_blocks == len(info.layers) == whole.config.num_hidden_layers
    assert info.hidden_size == whole.config.hidden_size
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for name, parameter in info.layers.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.stride() == (0,) * parameter.ndim, name
        assert parameter.device.type == "cpu"
    blocks = load_blocks(source, 0, info.num_blocks, dtype=torch.float32)
    setattr(info.decoder, info.layers_name, blocks.layers)
    assert torch.equal(model(ids).logits, whole(ids).logits)


@torch.no_grad()
def test_returns_tuple_is_what_a_block_does(folder: Path, ids: torch.Tensor) -> None:
    _, info = load_edges(resolve(folder), dtype=torch.float32)
    whole = _whole(folder)
    outputs: list[object] = []
    layers = getattr(whole.get_submodule(_path(whole, info.layers_name)), info.layers_name)
    layers[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    whole(ids)
    assert info.returns_tuple == isinstance(outputs[0], tuple)


def _path(model: torch.nn.Module, layers_name: str) -> str:
    """The decoder is the outermost module that has the list of blocks."""
    names = [name for name, module in model.named_modules() if hasattr(module, layers_name)]
    return min(names, key=lambda name: name.count("."))
