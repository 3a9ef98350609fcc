"""What `load_blocks` and `load_edges` give, against the whole model, for every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from swarm_notebook.checkpoint.anatomy import find_trunk
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import (
    LoadedBlocks,
    block_of_zeros,
    joined,
    load_blocks,
    load_edges,
)
from swarm_notebook.errors import Unsupported
from swarm_notebook.server.engine.span import Span


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
def test_blocks_go_on_with_others_around_the_same_weights(folder: Path, ids: torch.Tensor) -> None:
    source = resolve(folder)
    count = source.config().num_hidden_layers
    hidden = _whole(folder)(ids, output_hidden_states=True, use_cache=False).hidden_states[1]
    first = load_blocks(source, 0, count - 1, dtype=torch.float32)
    kept = first.part(1, count - 1)
    assert [one.data_ptr() for one in kept.layers.parameters()] == [
        one.data_ptr() for one in first.layers[1:].parameters()
    ]
    last = load_blocks(source, count - 1, count, dtype=torch.float32)
    expected = load_blocks(source, 1, count, dtype=torch.float32)
    assert _same(joined(source, [kept, last]), expected, hidden)
    # And back again; the first ones are as they were.
    again = load_blocks(source, 0, 1, dtype=torch.float32)
    assert _same(joined(source, [again, expected.part(1, count - 1)]), first, hidden)


def test_a_block_of_zeros_is_built_as_the_models_own(folder: Path) -> None:
    source = resolve(folder)
    for dtype in (torch.float32, torch.bfloat16):
        zeros = block_of_zeros(source, 1, dtype=dtype, device="cpu")
        own = load_blocks(source, 1, 2, dtype=dtype)
        assert zeros.config.to_dict() == own.config.to_dict()
        assert repr(zeros.layers) == repr(own.layers)
        assert [_built(one) for one in (zeros, own)] == [_built(own)] * 2
        assert not any(one.any() for one in zeros.layers.parameters())


def _built(blocks: LoadedBlocks) -> dict[str, Any]:
    named = (*blocks.model.named_parameters(), *blocks.model.named_buffers())
    return {name: (one.shape, one.dtype, one.device) for name, one in named}


def _same(ours: LoadedBlocks, theirs: LoadedBlocks, hidden: torch.Tensor) -> bool:
    """Whether two give the same, all of them and without the first."""
    assert ours.config.to_dict() == theirs.config.to_dict()
    found = []
    for blocks in (ours, theirs):
        span = Span(blocks.decoder, blocks.layers_name, blocks.start)
        ranges = [(start, blocks.end) for start in (blocks.start, blocks.start + 1)]
        found.append([span.run(*one, hidden)[0] for one in ranges])
    return all(map(torch.equal, *found))


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
    _first_block(whole).register_forward_hook(lambda _m, _i, output: outputs.append(output))
    whole(ids)
    assert info.returns_tuple == isinstance(outputs[0], tuple)


def _first_block(model: Any) -> torch.nn.Module:
    return find_trunk(model).layers[0]


@torch.no_grad()
def test_padding_and_positions_reach_the_blocks(folder: Path, ids: torch.Tensor) -> None:
    """A left-padded batch goes through the partial model as through the whole one."""
    source = resolve(folder)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "use_cache": False}
    states = _whole(folder)(ids, output_hidden_states=True, **options).hidden_states
    hidden = states[0]
    for start, end in [(0, 2), (2, 3)]:
        blocks = load_blocks(source, start, end, dtype=torch.float32)
        hidden = blocks.model(inputs_embeds=hidden, **options).last_hidden_state
        assert torch.equal(hidden, states[end])


@torch.no_grad()
def test_half_precision_is_transformers_own(folder: Path, ids: torch.Tensor) -> None:
    """Including weights that a family keeps in float32, and buffers."""
    source = resolve(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model, info = load_edges(source, dtype=torch.bfloat16)
    expected = {name: tensor.dtype for name, tensor in whole.named_parameters()}
    assert {name: tensor.dtype for name, tensor in model.named_parameters()} == expected
    blocks = load_blocks(source, 0, info.num_blocks, dtype=torch.bfloat16)
    setattr(info.decoder, info.layers_name, blocks.layers)
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_nothing_else_is_read(folder: Path) -> None:
    """What is read are the bytes of the wanted tensors; no parameter is left without memory."""
    source = resolve(folder)
    read: list[tuple[int, int]] = []
    blocks = load_blocks(
        source, 1, 3, dtype=torch.float32, progress=lambda done, total: read.append((done, total))
    )
    size = sum(parameter.nbytes for parameter in blocks.model.parameters())
    assert read[-1] == (size, size)
    whole = find_trunk(_whole(folder)).layers[1:3]
    assert size == sum(parameter.nbytes for parameter in whole.parameters())
    for name, tensor in (*blocks.model.named_parameters(), *blocks.model.named_buffers()):
        assert tensor.device.type == "cpu", name
        assert not tensor.requires_grad, name


def test_layers_keep_their_own_index(folder: Path) -> None:
    blocks = load_blocks(resolve(folder), 2, 4, dtype=torch.float32)
    indices = {
        module.layer_idx for module in blocks.layers.modules() if hasattr(module, "layer_idx")
    }
    assert indices == {2, 3}
    types = getattr(blocks.config, "layer_types", None)
    assert types is None or types == _whole(folder).config.layer_types[2:4]


@torch.no_grad()
def test_buffers_in_blocks_are_real_on_servers_and_placeholders_on_edges(tmp_path: Path) -> None:
    """GPT-Neo keeps its causal mask in a buffer of each block."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=128,
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=8,
        max_position_embeddings=64,
    )
    whole = GPTNeoForCausalLM(config).eval()
    whole.save_pretrained(tmp_path)
    source = resolve(tmp_path)
    model, info = load_edges(source, dtype=torch.float32)
    masks = [name for name, _ in info.layers.named_buffers()]
    assert len(masks) >= 4
    for buffer in info.layers.buffers():
        assert buffer.stride() == (0,) * buffer.ndim
    blocks = load_blocks(source, 0, 4, dtype=torch.float32)
    setattr(info.decoder, info.layers_name, blocks.layers)
    ids = torch.arange(3, 23)[None]
    assert torch.equal(model(ids).logits, whole(ids).logits)


@torch.no_grad()
def test_old_checkpoints_with_buffers_and_without_a_prefix(tmp_path: Path) -> None:
    """GPT-2 on the Hub: names begin with the block, and causal masks are stored as weights."""
    from safetensors.torch import load_file, save_file

    folder = tiny_model("gpt2", tmp_path)
    whole = _whole(folder)
    weights = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    for block in range(5):
        weights[f"h.{block}.attn.bias"] = torch.tril(torch.ones(1, 1, 8, 8))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve(folder)
    model, info = load_edges(source, dtype=torch.float32)
    setattr(
        info.decoder,
        info.layers_name,
        torch.nn.ModuleList(
            layer
            for start, end in [(0, 2), (2, 5)]
            for layer in load_blocks(source, start, end, dtype=torch.float32).layers
        ),
    )
    ids = torch.arange(3, 23)[None]
    assert torch.equal(model(ids).logits, whole(ids).logits)


@torch.no_grad()
def test_what_a_decoder_does_around_its_blocks_happens_once(tmp_path: Path) -> None:
    """Granite multiplies embeddings by a constant, outside of any module."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        embedding_multiplier=12.0,
    )
    whole = GraniteForCausalLM(config).eval()
    whole.save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    states = whole(ids, output_hidden_states=True).hidden_states
    hidden = states[0]
    for start, end in [(0, 2), (2, 3)]:
        blocks = load_blocks(resolve(tmp_path), start, end, dtype=torch.float32)
        hidden = blocks.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        assert torch.equal(hidden, states[end])
    source = resolve(tmp_path)
    parts = [load_blocks(source, *one, dtype=torch.float32) for one in [(0, 1), (1, 3)]]
    whole_span = load_blocks(source, 0, 3, dtype=torch.float32)
    assert _same(joined(source, parts), whole_span, states[0])


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=128,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        is_decoder=True,
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="neither an embedding nor a norm nor a projection"):
        load_blocks(resolve(tmp_path), 0, 1, dtype=torch.float32)


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "vptq", "config_for_layers": {}, "shared_layer_config": {}},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=lambda fields: fields["quant_method"],
)
def test_weights_whose_package_is_not_there(quantised: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantised
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="cannot be loaded without another package") as refused:
        load_blocks(resolve(folder), 0, 1, dtype=torch.float32)
    assert "\n" not in str(refused.value)
