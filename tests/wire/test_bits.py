"""Servers whose weights have few bits, against a local model with the same unpacked values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosting import HostedServer, HostedSwarm
from support.quantised import WIDE, fp8, written
from support.tiny import tiny_model

import swarm_notebook as sn
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.client.servers import bits
from swarm_notebook.errors import MissingBlocks, Unsupported
from swarm_notebook.server.engine.quantising import quality
from swarm_notebook.server.engine.quantising.loading import load_quantised
from swarm_notebook.server.engine.quantising.loss import measure_loss
from swarm_notebook.server.options import ServeOptions

BITS = 5.0


@dataclass
class Scene:
    folder: Path
    servers: HostedSwarm
    local: Any
    ratio: float


def unpacked(folder: Path, spans: list[tuple[int, int]]) -> Any:
    """The model with the values that servers of these blocks have."""
    from transformers import AutoModelForCausalLM

    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for start, end in spans:
        loaded, _ = load_quantised(resolve(folder), start, end, bits=BITS, dtype=torch.float32)
        for block, layer in enumerate(loaded.layers, start):
            whole = {
                name: parameter.unpack() if isinstance(parameter, PackedWeight) else parameter
                for name, parameter in layer.named_parameters()
            }
            local.model.layers[block].load_state_dict(whole)
    return local


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = tiny_model("llama", tmp_path_factory.mktemp("models"))
        spans = [(0, 3), (3, 5)]
        ratio = measure_loss(resolve(folder), bits=BITS, dtype=torch.float32).ratio
        with (
            HostedSwarm(folder, spans, bits=BITS, dtype="float32") as servers,
            servers.with_a_node(),
        ):
            yield Scene(folder, servers, unpacked(folder, spans), ratio)


def test_results_are_those_of_the_unpacked_values(scene: Scene) -> None:
    ids = torch.arange(3, 15)[None]
    with sn.connect(scene.servers.initial_peers, model=scene.folder, min_bits=4) as swarm:
        with torch.inference_mode():
            assert torch.allclose(swarm.model(ids).logits, scene.local(ids).logits, atol=1e-4)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(
            swarm.model.generate(ids, **options), scene.local.generate(ids, **options)
        )


def test_gradients_are_those_of_the_unpacked_values(scene: Scene) -> None:
    from peft import LoraConfig, get_peft_model

    ids = torch.arange(3, 15)[None]
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    with sn.connect(scene.servers.initial_peers, model=scene.folder, min_bits=4) as swarm:
        gradients = []
        for model in (swarm.model, scene.local):
            torch.manual_seed(0)
            tuned = get_peft_model(model, LoraConfig(**config))
            tuned(input_ids=ids, labels=ids).loss.backward()
            found = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
            tuned.unload()
            gradients.append(found)
        remote, local = gradients
        assert remote.keys() == local.keys()
        for name, gradient in remote.items():
            scale = local[name].abs().max()
            assert (gradient - local[name]).abs().max() <= 1e-4 * scale, name


@pytest.mark.works("PEFT: adapters on servers with few bits, with index tensors, too")
def test_adapters_around_packed_weights(scene: Scene) -> None:
    """What is drawn from the base weights comes from the checkpoint, so both get the same."""
    import peft

    targets = ["q_proj", "down_proj"]
    kinds = [
        peft.LoraConfig(r=4, target_modules=targets, use_dora=True),
        peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.up_proj.weight"]),
        peft.SupertuningConfig(target_modules=targets),
        peft.TrainableTokensConfig(target_modules=["q_proj"], token_indices=[1]),
        peft.OFTConfig(target_modules=targets),
    ]
    ids = torch.arange(3, 15)[None]
    with sn.connect(scene.servers.initial_peers, model=scene.folder, min_bits=4) as swarm:
        for config in kinds:
            models: list[Any] = [
                peft.get_peft_model(copy.deepcopy(one), copy.deepcopy(config)).eval()
                for one in (swarm.model, scene.local)
            ]
            ours, theirs = (dict(model.named_parameters()) for model in models)
            trained = [name for name, one in ours.items() if one.requires_grad]
            buffers = dict(models[1].named_buffers())
            with torch.no_grad():
                for name in trained:
                    ours[name].add_(0.05 * torch.randn(ours[name].shape))
                    theirs[name].copy_(ours[name])
                for name, buffer in models[0].named_buffers():
                    if "tuning" in name:
                        buffers[name].copy_(buffer)
            found = [model(ids, labels=ids) for model in models]
            torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-4, rtol=0)
            with torch.no_grad():
                change = found[0].logits - swarm.model(ids).logits
            assert change.abs().max() > 1e-3
            for one in found:
                one.loss.backward()
            for name in trained:
                scale = theirs[name].grad.abs().max() + 1e-9
                assert (ours[name].grad - theirs[name].grad).abs().max() <= 1e-4 * scale, name


def test_status_says_what_is_served(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "swarm_notebook.connecting"),
        sn.connect(scene.servers.initial_peers, model=scene.folder) as swarm,
    ):
        status = swarm.status()
    assert "results differ from those of the original weights" in caplog.text
    for row in status.servers:
        assert row.quant == "int4"
        assert row.bits is not None
        assert 4 < row.bits <= BITS
        assert row.error is not None
        assert 0 < row.error < 1  # random weights amplify errors
        assert row.perplexity == scene.ratio
        assert f"{row.bits:.3g} bits" in str(status)
        assert f"perplexity x {scene.ratio:.3g}" in str(status)
    with sn.connect(scene.servers.initial_peers, model=scene.folder) as swarm:
        swarm.connection.directory.min_bits = 16
        with pytest.raises(MissingBlocks, match="min_bits is 16"):
            swarm.route()


def test_a_float_server_is_preferred_to_none_but_said(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    with HostedSwarm(scene.folder, [(0, 5)], dtype="float32") as whole:
        ids = torch.arange(3, 9)[None]
        with sn.connect(whole.initial_peers, model=scene.folder) as swarm:
            swarm.model(ids)
            directory = swarm.connection.directory
            with caplog.at_level(logging.WARNING, bits.__name__):
                directory.bits.by_block |= dict.fromkeys(range(5), 4.5)
                swarm.model(ids)
                swarm.model(ids)
    assert caplog.text.count("results change") == 1


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "gpt_oss", "gemma2", "bloom"])
def test_families_compute_with_their_unpacked_values(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = resolve(tiny_model(family, tmp_path))
    loaded, found = load_quantised(source, 1, 3, bits=5.5, dtype=torch.float32)
    again, same = load_quantised(source, 1, 3, bits=5.5, dtype=torch.float32)
    assert found == same
    assert found.bits <= 5.5
    assert 0 < found.error < 1
    whole = load_blocks(source, 1, 3, dtype=torch.float32)
    for packed, layer in zip(loaded.layers, whole.layers, strict=True):
        weights = dict(layer.named_parameters())
        for name, parameter in packed.named_parameters():
            if isinstance(parameter, PackedWeight):
                weights[name].data.copy_(parameter.unpack())
    states = torch.randn(2, 7, whole.config.hidden_size)
    with torch.inference_mode():
        outputs = [
            one.model(inputs_embeds=states, use_cache=False).last_hidden_state
            for one in (loaded, whole, again)
        ]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.equal(outputs[0], outputs[2])


def test_impossible_bits_are_said(scene: Scene) -> None:
    with pytest.raises(Unsupported, match=r"expected 2\.5 to 16 bits"):
        HostedServer(ServeOptions(scene.folder, bits=1)).__enter__()
    with pytest.raises(Unsupported, match="too little"):
        load_quantised(resolve(scene.folder), 0, 1, bits=2.5, dtype=torch.float32)


def packed_bytes(server: HostedServer) -> int:
    """What the parameters of a server's blocks take."""
    return sum(
        one.packed.nbytes if isinstance(one, PackedWeight) else one.nbytes
        for layer in server.layers
        for one in layer.parameters()
    )


def test_memory_chooses_blocks_and_bits_together(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many blocks as are good enough, and then the most bits that hold them."""
    # Random weights make large errors of small ones: any number of bits is to do here.
    monkeypatch.setattr(quality, "GOOD_ERROR", 0.1)
    blocks = load_blocks(resolve(scene.folder), 0, 5, dtype=torch.float32).layers
    block = sum(one.numel() for one in blocks[0].parameters())
    caplog.set_level(logging.INFO, "swarm_notebook")
    options = {"cache_tokens": 512, "dtype": "float32"}
    with HostedServer(ServeOptions(scene.folder, memory=4 * 5 * block, **options)) as whole:
        assert whole.blocks == (0, 5)
        assert packed_bytes(whole) == 4 * 5 * block
    for memory, asked in ((3 * block, None), (3 * block, 4.5)):
        caplog.clear()
        given = ServeOptions(scene.folder, memory=memory, bits=asked, **options)
        with HostedServer(given) as server:
            start, end = server.blocks
            taken = packed_bytes(server)
        assert taken <= memory
        least = asked or quality.least_bits(
            resolve(scene.folder), dtype=torch.float32, device="cpu"
        )
        # One block more would have had too few bits, and a bit more would not have fitted.
        assert end == 5 or (end + 1) * block * least >= 8 * memory
        bits = 8 * taken / ((end - start) * block)
        assert bits >= least
        assert taken > 0.9 * memory
        assert f"hold {end - start} blocks at {least:.3g} bits" in caplog.text
    few = ServeOptions(scene.folder, (0, 5), memory=block, **options)
    with pytest.raises(Unsupported, match=r"hold [0-4] of 5 blocks.*more --memory"):
        HostedServer(few).__enter__()


def test_a_checkpoint_that_is_quantised_already(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("llama", tmp_path, **WIDE)
    written(folder, fp8, quant_method="fp8", weight_block_size=[128, 128])
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 15)[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with (
        caplog.at_level(logging.WARNING, "swarm_notebook"),
        HostedSwarm(folder, [(0, 2), (2, 4)], dtype="float32") as servers,
        sn.connect(servers.initial_peers, model=folder) as swarm,
    ):
        tokens = swarm.model.generate(ids, **options)
        assert torch.equal(tokens, local.generate(ids, **options))
        rows = swarm.status().servers
    # 147,456 weights in 8 bits with 10 scales of 32, and 256 of norms in 32: 8.044.
    assert [row.precision for row in rows] == ["float32, 8.04 bits"] * 2
    assert "results differ" not in caplog.text
