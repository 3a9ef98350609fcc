"""Checkpoints that were quantised before, against local models with the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantised import WIDE, awq, fp8, gptq, mxfp4, written
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.files.weights import block_index
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.checkpoint.parts.partial import load_blocks, load_edges
from swarm_notebook.errors import ModelNotFound, Unsupported
from swarm_notebook.server.engine.products import few_bits
from swarm_notebook.server.engine.quantising.loading import load_within
from swarm_notebook.server.loading.room import room_for
from swarm_notebook.server.options import ServeOptions

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
# One module in blocks that two servers have is not quantised, and named.
LEFT_OUT = ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head"]
IDS = torch.arange(3, 15)[None]


def through_blocks(folder: Path) -> tuple[torch.Tensor, float | None]:
    """What the blocks of two servers make of some tokens, and their bits per weight."""
    source = resolve(folder)
    edges, _ = load_edges(source, dtype=torch.float32)
    bits = None
    with torch.inference_mode():
        states = edges.get_input_embeddings()(IDS)
        for start, end in ((0, 2), (2, 4)):
            loaded, told = load_within(source, start, end, bits=None, dtype=torch.float32)
            states = loaded.model(inputs_embeds=states, use_cache=False).last_hidden_state
            bits = told and told.bits
        found: torch.Tensor = edges.lm_head(edges.base_model.norm(states))
    return found, bits


@pytest.mark.parametrize(
    ("write", "config", "bits"),
    [
        (fp8, {**FP8, "modules_to_not_convert": LEFT_OUT}, (8, 11)),
        (gptq(), GPTQ, (4.5, 5.5)),
        (gptq(act_order=True), {**GPTQ, "desc_act": True}, (4.5, 5.5)),
        (awq, AWQ, (4.5, 5.5)),
    ],
)
def test_values_are_those_that_the_format_defines(
    write: Callable[..., Any], config: dict[str, Any], bits: tuple[float, float], tmp_path: Path
) -> None:
    folder = tiny_model("llama", tmp_path, **WIDE)
    model = written(folder, write, **config)
    with torch.inference_mode():
        expected = model(IDS).logits
    found, told = through_blocks(folder)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert told is not None
    assert bits[0] < told < bits[1]


@pytest.mark.parametrize(
    ("write", "config"),
    [(gptq(), GPTQ), (gptq(act_order=True), {**GPTQ, "desc_act": True}), (awq, AWQ)],
)
def test_words_stay_packed_where_memory_is_short(
    write: Callable[..., Any], config: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_model("llama", tmp_path, **WIDE)
    written(folder, write, **config, modules_to_not_convert=LEFT_OUT)
    source, options = resolve(folder), {"bits": None, "dtype": torch.float32}
    packed, told = load_within(source, 1, 3, memory=1, **options)
    whole, _ = load_within(source, 1, 3, memory=1 << 40, **options)
    few_bits.install(packed.layers)
    kept = [one for layer in packed.layers for one in layer.parameters()]
    assert sum(isinstance(one, PackedWeight) for one in kept) == 12
    assert sum(isinstance(one, PackedWeight) for one in whole.model.parameters()) == 0
    stored, index = source.weights(), {name: block_index(name) for name in source.weights().names()}
    names = [name for name, block in index.items() if block in (1, 2)]
    share = sum(lazy.nbytes for lazy in stored.lazy(names).values())
    held = sum(one.packed.nbytes if isinstance(one, PackedWeight) else one.nbytes for one in kept)
    assert held <= 1.05 * share
    assert told is not None
    assert 4.5 < told.bits < 10  # two of 14 matrices are whole
    states = torch.randn(2, 7, 128)
    with torch.inference_mode():
        found, expected = (
            one.model(inputs_embeds=states, use_cache=False).last_hidden_state
            for one in (packed, whole)
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("write", "config"), [(gptq(), GPTQ), (awq, AWQ), (fp8, FP8)])
def test_memory_counts_what_blocks_will_take(
    write: Callable[..., Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """8-bit floats are dequantised on CPUs; integers in words stay."""
    folder = tiny_model("llama", tmp_path, **WIDE)
    written(folder, write, **config)
    source = resolve(folder)

    def held(count: int, memory: int) -> int:
        loaded, _ = load_within(source, 0, count, bits=None, memory=memory, dtype=torch.float32)
        return sum(
            one.packed.nbytes if isinstance(one, PackedWeight) else one.nbytes
            for layer in loaded.layers
            for one in layer.parameters()
        )

    memory = int(2.5 * held(1, memory=1))
    options = ServeOptions(folder, memory=memory, device="cpu")
    room = room_for(source, options)
    assert (room.blocks, room.bits) == (2, None)
    # Four bits are multiplied as they are in bfloat16 alone.
    assert room.dtype == ("float32" if config is FP8 else "bfloat16")
    assert held(2, memory) <= memory


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_results_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Where it loads them here by itself: both dequantised."""
    if kind == "fp8":
        folder = tiny_model("llama", tmp_path, **WIDE)
        written(folder, fp8, **FP8, modules_to_not_convert=LEFT_OUT)
    else:
        folder = mxfp4(tmp_path)
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = local(IDS).logits
    found, _ = through_blocks(folder)
    assert torch.allclose(found, expected.float(), atol=1e-5 * float(expected.abs().max()))


def test_what_nothing_here_reads_is_named(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    file = folder / "config.json"
    plain = json.loads(file.read_text())

    def refused(config: dict[str, Any], message: str) -> None:
        file.write_text(json.dumps(plain | {"quantization_config": config}))
        with pytest.raises(Unsupported, match=message) as caught:
            load_blocks(resolve(folder), 0, 2, dtype=torch.float32)
        assert "\n" not in str(caught.value)

    refused({"quant_method": "sorcery"}, "'sorcery', which transformers does not know")
    refused({"bits": 4}, "unreadable")
    refused({**GPTQ, "bits": 3}, "are not read; read are gptq and gptq_v2")
    refused({**AWQ, "version": "gemv"}, "are not read; read are gemm")


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    """A notebook needs none as long as embeddings and head are floats."""
    folder = tiny_model("llama", tmp_path)
    file = folder / "config.json"
    config = {"quant_method": "vptq", "config_for_layers": {}, "shared_layer_config": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    source = resolve(folder)
    with pytest.raises(Unsupported, match=r"cannot be loaded without another package: .*vptq"):
        load_blocks(source, 0, 2, dtype=torch.float32)
    edges, _ = load_edges(source, dtype=torch.float32)
    assert not hasattr(edges.config, "quantization_config")
    with pytest.raises(Unsupported, match=r"quantised already, by vptq: .*without --bits"):
        load_within(source, 0, 2, bits=4.5, dtype=torch.float32)


@pytest.mark.parametrize("method", ["hqq", "higgs"])
def test_what_transformers_names_but_cannot_load_is_said(method: str, tmp_path: Path) -> None:
    """Whether or not its library is installed: that would not help."""
    folder = tiny_model("llama", tmp_path)
    file = folder / "config.json"
    config = {"quant_method": method}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    with pytest.raises(Unsupported, match=rf"quantised by {method}, which transformers .*--bits"):
        load_blocks(resolve(folder), 0, 2, dtype=torch.float32)


def test_words_that_do_not_fit_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, **WIDE)
    written(folder, gptq(), **GPTQ)
    file = folder / "model.safetensors"
    whole = load_file(file)
    module = "model.layers.1.mlp.up_proj"

    def refused(message: str, **changed: torch.Tensor | None) -> None:
        found = whole | {f"{module}.{part}": value for part, value in changed.items()}
        save_file({name: value for name, value in found.items() if value is not None}, file)
        with pytest.raises(ModelNotFound, match=message):
            load_blocks(resolve(folder), 0, 2, dtype=torch.float32)

    scales, index = whole[f"{module}.scales"], whole[f"{module}.g_idx"]
    refused("lacks qzeros", qzeros=None)
    refused("has the shape", scales=scales[:-1].contiguous())
    refused("number of dimensions", qzeros=torch.zeros(4, dtype=torch.int32))
    refused("NaN or infinity", scales=scales.clone().fill_(float("nan")))
    refused("not in words of 32 bits", qweight=whole[f"{module}.qweight"].to(torch.int16))
    refused("groups that are not there", g_idx=index + 5)


def test_a_scale_that_is_no_number_is_found(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, **WIDE)
    written(folder, fp8, **FP8)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    tensors[scale][0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(ModelNotFound, match=f"{scale} has NaN or infinity"):
        load_blocks(resolve(folder), 0, 2, dtype=torch.float32)


def test_weights_that_are_no_numbers_are_not_packed(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ModelNotFound, match=r"block 1 of .* makes NaN or infinity"):
        load_within(resolve(folder), 0, 2, bits=6, dtype=torch.float32)
