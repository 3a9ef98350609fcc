"""Adapters of the notebook on servers whose weights have few bits, against local models.

The local model has the values that the servers compute with, unpacked here by other means than the
servers': by the `gguf` package, or one weight at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import peft
import pytest
import torch
from support.gguf_files import write_gguf
from support.hosting import HostedSwarm
from support.tiny import build, tiny_model

import swarm_notebook as sn
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.server.engine.quantising import loading

SPANS = [(0, 2), (2, 5)]
# Rows of a quantised GGUF matrix are whole groups of 32 values.
IN_GROUPS = {"hidden_size": 64, "intermediate_size": 96}


class Pair(NamedTuple):
    remote: Any
    local: Any


def of_gguf(kind: gguf.GGMLQuantizationType, *, packed: bool) -> Callable[..., tuple[Path, Any]]:
    """A GGUF file with matrices of a type, on servers that keep them as stored or unpack them."""

    def make(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Any]:
        model = build("llama", **IN_GROUPS)
        path = folder / "tiny.gguf"
        write_gguf(path, model, "llama", kind=kind)
        # They stay packed where unpacked ones would not leave half of the memory free.
        patch.setattr(loading, "free_memory", lambda _device: 0 if packed else 1 << 40)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    stored = gguf.quants.quantize(parameter.numpy(), kind)
                    parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
        return path, model

    return make


def of_bits(folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A checkpoint of floats, on servers with 4.5 bits per weight."""
    from transformers import AutoModelForCausalLM

    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    path = tiny_model("llama", folder)
    local: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for start, end in SPANS:
        loaded, _ = loading.load_quantised(resolve(path), start, end, bits=4.5, dtype=torch.float32)
        for block, layer in enumerate(loaded.layers, start):
            for name, parameter in layer.named_parameters():
                if isinstance(parameter, PackedWeight):
                    local.model.layers[block].get_parameter(name).data = parameter.unpack()
    return path, local


TYPES = gguf.GGMLQuantizationType
KINDS: dict[str, tuple[Callable[..., tuple[Path, Any]], float | None, bool]] = {
    "4.5 bits": (of_bits, 4.5, True),
    "GGUF Q4_0, as stored": (of_gguf(TYPES.Q4_0, packed=True), None, True),
    "GGUF Q5_0, as stored": (of_gguf(TYPES.Q5_0, packed=True), None, True),
    "GGUF Q8_0, unpacked": (of_gguf(TYPES.Q8_0, packed=False), None, False),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    make, bits, packed = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        path, local = make(tmp_path_factory.mktemp("models"), patch)
        servers = running.enter_context(HostedSwarm(path, SPANS, bits=bits, dtype="float32"))
        for server in servers.servers:
            kept = any(isinstance(one, PackedWeight) for one in server.layers[0].parameters())
            assert kept == packed
        swarm = running.enter_context(
            sn.connect(servers.initial_peers, model=path, dtype=torch.float32, min_bits=4)
        )
        yield Pair(swarm.model, local.requires_grad_(False))


LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "o_proj", "down_proj"]}


@pytest.mark.works("PEFT: adapters on servers of GGUF files or with few bits (LoRA, generation)")
def test_lora(pair: Pair) -> None:
    """Logits, gradients, a step of training, tokens, and the adapter switched off."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found: list[list[torch.Tensor]] = []
    tokens: list[torch.Tensor] = []
    for model in pair:
        torch.manual_seed(0)
        tuned: Any = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**LORA))
        weights = [one for one in tuned.parameters() if one.requires_grad]
        output = tuned(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = [one.grad.clone() / one.grad.abs().max() for one in weights]
        torch.optim.SGD(weights, 0.1).step()
        with torch.no_grad():
            after = tuned(input_ids=ids).logits
            with tuned.disable_adapter():
                bare = tuned(input_ids=ids).logits
        assert (after - bare).abs().max() > 0.1
        found.append([output.logits.detach(), *gradients, after, bare])
        tokens.append(tuned.generate(input_ids=ids, **options))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(*tokens)
