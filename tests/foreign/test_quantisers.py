"""Checkpoints that other libraries quantised, in part, against the whole model of transformers.

The libraries are none of ours: what is not installed is skipped (`make quantisers` installs them
into a folder of their own, and runs this).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.hosting import HostedSwarm
from support.quantised import WIDE
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_edges
from swarm_notebook.net.wire import codecs, tensors
from swarm_notebook.net.wire.message import PackedTensor
from swarm_notebook.server.engine.quantising.loading import load_within
from swarm_notebook.server.loading.room import room_for
from swarm_notebook.server.options import ServeOptions

IDS = torch.arange(3, 15)[None]


def needs(library: str) -> pytest.MarkDecorator:
    """Skip a test where a library is not installed."""
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed: make quantisers")


def logits(folder: Path) -> tuple[torch.Tensor, list[float]]:
    """What two servers and a notebook make of some tokens, and the servers' bits per weight."""
    source = resolve(folder)
    edges, _ = load_edges(source, dtype=torch.float32)
    bits = []
    with torch.inference_mode():
        states = edges.get_input_embeddings()(IDS)
        for start, end in ((0, 2), (2, 4)):
            loaded, told = load_within(source, start, end, bits=None, dtype=torch.float32)
            states = loaded.model(inputs_embeds=states, use_cache=False).last_hidden_state
            bits += [] if told is None else [told.bits]
        found: torch.Tensor = edges.lm_head(edges.base_model.norm(states))
    return found, bits


def check(folder: Path, most: float, **options: Any) -> None:
    """Whether results are exactly those of the whole model, in about so many bits."""
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.inference_mode():
        expected = local(IDS).logits
    found, bits = logits(folder)
    assert torch.equal(found, expected)
    assert len(bits) == 2
    assert most - 0.8 < max(bits) < most


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 5.2),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 5.2),
        ({"load_in_8bit": True}, 8.9),
    ],
)
def test_bitsandbytes(config: dict[str, Any], most: float, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    folder = tiny_model("llama", tmp_path, **WIDE)
    told = BitsAndBytesConfig(**config)
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=told, dtype=torch.float32
    ).save_pretrained(saved)
    check(saved, most)
    # It stays packed here, and `--memory` knows.
    source = resolve(saved)
    (layer,) = load_within(source, 0, 1, bits=None, dtype=torch.float32)[0].layers
    held = sum(one.nbytes for one in layer.parameters())
    options = ServeOptions(saved, memory=int(2.6 * held), device="cpu")
    assert room_for(source, options).blocks == 2


@needs("compressed_tensors")
@pytest.mark.parametrize(
    ("preset", "largest", "most"),
    [("W4A16", 7.5, 5.0), ("W8A16", 127.5, 9.0), ("FP8_DYNAMIC", 448.0, 9.0)],
)
def test_compressed_tensors(preset: str, largest: float, most: float, tmp_path: Path) -> None:
    """On CPUs weights alone are read; a preset that rounds activations, too, has them whole."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from transformers import CompressedTensorsConfig

    folder, saved = tiny_model("llama", tmp_path, **WIDE), tmp_path / "saved"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"])
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight_scale.shape[1]
            rows = module.weight.detach().unflatten(1, (groups, -1))
            module.weight_scale.data.copy_(rows.abs().amax(dim=2) / largest)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(saved)
    compressor.update_config(str(saved))
    check(saved, most, quantization_config=CompressedTensorsConfig(dequantize=True))


def torchao_saved(kind: str, folder: Path) -> Path:
    """A tiny Llama that torchao has quantised."""
    from torchao import quantization
    from transformers import TorchAoConfig

    saved, told = folder / "saved", TorchAoConfig(getattr(quantization, kind)())
    AutoModelForCausalLM.from_pretrained(
        tiny_model("llama", folder, **WIDE), quantization_config=told, dtype=torch.float32
    ).save_pretrained(saved)
    return saved


@needs("torchao")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(kind: str, tmp_path: Path) -> None:
    """Its tensors are put together by what the headers of whole files say of them."""
    check(torchao_saved(kind, tmp_path), 9.0)


@needs("bitsandbytes")
@needs("torchao")
@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_servers(library: str, tmp_path: Path) -> None:
    """Steps, a prompt and gradients through servers of what these libraries have packed."""
    from transformers import BitsAndBytesConfig

    if library == "torchao":
        saved = torchao_saved("Int8WeightOnlyConfig", tmp_path)
    else:
        saved = tmp_path / "saved"
        AutoModelForCausalLM.from_pretrained(
            tiny_model("llama", tmp_path, **WIDE),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
            dtype=torch.float32,
        ).save_pretrained(saved)
    local: Any = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with (
        HostedSwarm(saved, [(0, 2), (2, 4)], dtype="float32") as servers,
        sn.connect(servers.initial_peers, model=saved) as swarm,
    ):
        tokens = swarm.model.generate(IDS, **options)
        assert torch.equal(tokens, local.generate(IDS, **options))
        gradients = []
        for model in (swarm.model, local):
            states = model.get_input_embeddings()(IDS).detach().requires_grad_()
            model(inputs_embeds=states).logits.square().mean().backward()
            gradients.append(states.grad)
    assert torch.allclose(*gradients, atol=1e-4 * float(gradients[1].abs().max()))


@needs("bitsandbytes")
def test_blocks_on_the_wire_are_those_of_bitsandbytes() -> None:
    """What hivemind writes with it is read here, and the other way around."""
    from bitsandbytes.functional import dequantize_blockwise
    from hivemind.compression import serialize_torch_tensor

    whole = torch.randn(3, 50, 48, generator=torch.Generator().manual_seed(0)) * 3
    theirs = PackedTensor.of(serialize_torch_tensor(whole, codecs.BLOCKWISE_8BIT))
    ours = tensors.pack(whole, codecs.BLOCKWISE_8BIT)
    for packed in (theirs, ours):
        sizes, book, chosen = np.split(
            np.frombuffer(packed.buffer, np.uint8), [16 + 8, 16 + 8 + 1024]
        )
        sizes = sizes[16:].view(np.float32)
        expected = dequantize_blockwise(
            torch.from_numpy(chosen.copy()),
            absmax=torch.from_numpy(sizes.copy()),
            code=torch.from_numpy(book.view(np.float32).copy()),
            blocksize=4096,
        )
        torch.testing.assert_close(tensors.unpack(packed).flatten(), expected)
    assert ours.buffer[:1048] == theirs.buffer[:1048]
    mine, other = (np.frombuffer(one.buffer[1048:], np.uint8).astype(int) for one in (ours, theirs))
    apart = np.abs(mine - other)
    # What lies in the middle of two entries.
    assert apart.max() <= 1
    assert apart.mean() < 0.01
