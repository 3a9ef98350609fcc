"""GGUF files written as llama.cpp writes them, read back as transformers' tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from support.gguf_files import write_gguf
from support.tiny import build

from swarm_notebook.checkpoint.as_stored import keep_packed
from swarm_notebook.checkpoint.files.gguf import MAX_ELEMENTS, GgufFile, GgufWeights
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.files.weights import block_index
from swarm_notebook.checkpoint.gguf_packed import PackedGguf
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.checkpoint.parts.partial import (
    LoadedBlocks,
    load_blocks,
    load_edges,
    load_one_by_one,
)
from swarm_notebook.errors import ModelNotFound, Unsupported
from swarm_notebook.server.engine.quantising.loading import load_within


@pytest.fixture(params=[("llama", "llama"), ("qwen3", "qwen3"), ("qwen3_moe", "qwen3moe")])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    family, architecture = request.param
    model = build(family)
    path = tmp_path / f"tiny.{family}.gguf"
    write_gguf(path, model, architecture)
    return model, path


def test_every_tensor_comes_back(written: tuple[Any, Path]) -> None:
    model, path = written
    weights = GgufWeights(path, model.config)
    read = {name: lazy[...] for name, lazy in weights.lazy(weights.names()).items()}
    expected = model.state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name


@torch.no_grad()
def test_blocks_and_edges_load_from_the_file(tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "tiny.llama.gguf"
    write_gguf(path, model, "llama")
    source = resolve(path)
    assert source.dht_prefix == path.stem.replace(".", "-")
    assert source.config().num_hidden_layers == model.config.num_hidden_layers
    assert source.generation_config() is None
    ids = torch.arange(3, 13)[None]
    states = model(ids, output_hidden_states=True).hidden_states
    blocks = load_blocks(source, 1, 3, dtype=torch.float32)
    output = blocks.model(inputs_embeds=states[1], use_cache=False).last_hidden_state
    # The file holds the norms' epsilon in single precision, so not bit for bit.
    torch.testing.assert_close(output, states[3], rtol=1e-5, atol=1e-5)
    edges, _ = load_edges(source, dtype=torch.float32)
    assert torch.equal(edges.lm_head.weight, model.lm_head.weight)


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tmp_path / "q8.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("b.weight", values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert np.abs(file.values("a.weight") - values).max() < 0.02
    assert np.array_equal(file.values("b.weight"), values.astype(np.float16).astype(np.float32))
    assert file.nbytes("a.weight") == 4 * 2 * 34


@pytest.mark.parametrize("length", [4, 20, 200, 1000])
def test_a_header_that_is_cut_off(written: tuple[Any, Path], length: int) -> None:
    _, path = written
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelNotFound, match="cut off"):
        GgufFile(path)


def test_a_tensor_that_is_cut_off(written: tuple[Any, Path]) -> None:
    _, path = written
    path.write_bytes(path.read_bytes()[:-100])
    file = GgufFile(path)
    last = max(file.tensors, key=lambda name: file.tensors[name].offset)
    with pytest.raises(ModelNotFound, match="ends before its tensor"):
        file.values(last)


def test_a_count_that_lies_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "liar.gguf"
    header = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 1], "<u8").tobytes()
    key = np.array([1], "<u8").tobytes() + b"k"
    array = np.array([9, 4], "<u4").tobytes() + np.array([2**40], "<u8").tobytes()
    path.write_bytes(header + key + array + bytes(64))
    with pytest.raises(ModelNotFound, match="cut off"):
        GgufFile(path)


def test_an_array_that_is_there_but_has_too_many_elements(tmp_path: Path) -> None:
    """Each of its bytes would be an object of Python."""
    path = tmp_path / "long.gguf"
    count = MAX_ELEMENTS + 1
    header = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([0, 1], "<u8").tobytes()
    key = np.array([1], "<u8").tobytes() + b"k"
    array = np.array([9, 0], "<u4").tobytes() + np.array([count], "<u8").tobytes()
    path.write_bytes(header + key + array)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + count)
    with pytest.raises(ModelNotFound, match=f"an array of {count} elements"):
        resolve(path).config()


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(np.ones((2, 64), np.float32), kind)
    stored[1, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelNotFound, match=r"a\.weight has NaN or infinity"):
        GgufFile(path).values("a.weight")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_tensor("blk.0.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelNotFound, match="no-such-architecture"):
        resolve(path).config()
    with pytest.raises(Unsupported, match="no-such-architecture"):
        GgufWeights(path, build("llama").config).names()


def test_a_split_file_is_read_as_one(tmp_path: Path) -> None:
    model, path = build("llama"), tmp_path / "tiny.gguf"
    write_gguf(path, model, "llama", split_max_tensors=20)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 1
    weights = GgufWeights(parts[0], model.config)
    for name, lazy in weights.lazy(weights.names()).items():
        assert torch.equal(lazy[...], model.state_dict()[name]), name
    with pytest.raises(ModelNotFound, match=r"give the first of them"):
        GgufWeights(parts[1].rename(tmp_path / "other.gguf"), model.config)
    with pytest.raises(ModelNotFound, match=f"lacks {parts[1].name}"):
        GgufWeights(parts[0], model.config)


def _wide(tmp_path: Path, kind: Any) -> Path:
    """A model whose matrices are stored in a type that has groups of 32."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 64}
    path = tmp_path / "wide.gguf"
    write_gguf(path, build("llama", **sizes, vocab_size=64), "llama", kind=kind)
    return path


@pytest.mark.parametrize(
    ("bits", "free", "packed"), [(None, 1 << 40, 0), (None, 1, 14), (16, 1, 0)]
)
def test_matrices_are_unpacked_where_there_is_room(
    bits: float | None, free: int, packed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(_wide(tmp_path, gguf.GGMLQuantizationType.Q4_1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    loaded, told = load_within(source, 1, 3, bits=bits, dtype=torch.float32)
    kinds = [type(parameter) for layer in loaded.layers for parameter in layer.parameters()]
    assert kinds.count(PackedWeight) == packed
    assert (told is not None) == bool(packed)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_0", "F16"])
def test_matrices_stay_packed(kind: str, tmp_path: Path) -> None:
    source = resolve(_wide(tmp_path, gguf.GGMLQuantizationType[kind]))
    weights = source.weights()
    assert isinstance(weights, GgufWeights)
    whole = load_blocks(source, 1, 3, dtype=torch.float32)
    taken = count = 0

    def change(one: LoadedBlocks) -> None:
        nonlocal taken, count
        nbytes, numbers = keep_packed(weights, one)
        taken, count = taken + nbytes, count + numbers

    packed = load_one_by_one(source, 1, 3, change, dtype=torch.float32)
    names = [name for name in weights.names() if block_index(name) in (1, 2)]
    share = sum(lazy.nbytes for lazy in weights.lazy(names).values())
    assert taken <= 1.15 * share
    for ours, theirs in zip(packed.layers, whole.layers, strict=True):
        for name, parameter in ours.named_parameters():
            expected = dict(theirs.named_parameters())[name]
            if expected.ndim > 1:
                assert isinstance(parameter, PackedWeight), name
                parameter = parameter.unpack()
            assert torch.equal(parameter, expected), name
    states = torch.randn(1, 5, 256)
    outputs = [
        one.model(inputs_embeds=states, use_cache=False).last_hidden_state
        for one in (packed, whole)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "kind",
    [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
        "MXFP4",
        "TQ2_0",
        "F16",
        "BF16",
    ],
)
def test_any_bytes_unpack_as_the_package_unpacks_them(kind: str) -> None:
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    known = gguf.GGMLQuantizationType[kind]
    shape = quant_shape_to_byte_shape((3, 512), known)
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    packed = PackedGguf(known, torch.Size([3, 512]), torch.from_numpy(raw))
    with np.errstate(all="ignore"):  # some scales are not finite
        expected = dequantize(raw, known)
    assert np.array_equal(packed.unpack(torch.float32).numpy(), expected, equal_nan=True)
    assert np.isfinite(expected).mean() > 0.5
    assert packed.nbytes == raw.size


@pytest.mark.parametrize("alignment", [0, "thirty"])
def test_an_alignment_that_is_none(alignment: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value(
        "general.alignment",
        alignment,
        gguf.GGUFValueType.STRING if alignment else gguf.GGUFValueType.UINT32,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelNotFound, match="not a readable GGUF file"):
        GgufFile(path)


def test_a_shape_that_its_type_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    entry = np.array([1], "<u8").tobytes() + b"a" + np.array([1], "<u4").tobytes()
    entry += np.array([33], "<u8").tobytes() + np.array([8], "<u4").tobytes() + bytes(8)
    header = b"GGUF" + np.array([3], "<u4").tobytes() + np.array([1, 0], "<u8").tobytes()
    path.write_bytes(header + entry + bytes(64))
    with pytest.raises(ModelNotFound, match="a shape that its type cannot have"):
        GgufFile(path).nbytes("a")
