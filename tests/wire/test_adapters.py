"""Adapters on a real server against the same adapters on the local model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.bench import Bench, Benches, relative, run_blocks
from support.peft_adapters import Tuned, key, random
from support.raw_wire import RawClient

from swarm_notebook.errors import AdapterMissing, BadRequest
from swarm_notebook.net.wire import protocol

HIDDEN, TOLERANCE = 48, 1e-4


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 16}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True, "lora_bias": False}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "ia3": ("IA3Config", {}),
    "loha": ("LoHaConfig", {"r": 3}),
    "lokr": ("LoKrConfig", {"r": 3, "decompose_both": True}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "vera": ("VeraConfig", {"r": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(bench: Bench, kind: str) -> None:
    if bench.family == "gpt2" and kind in {"loha", "lokr", "oft"}:
        pytest.skip("PEFT has no LoHa, LoKr and OFT for GPT-2's Conv1D")
    tuned = Tuned(bench, KINDS[kind][0], **KINDS[kind][1])
    _, said = tuned.upload()
    assert said["ok"] is True
    hidden, grad = random(3, 9, HIDDEN), random(3, 9, HIDDEN, seed=1)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :4] = 0
    grad *= mask[:, :, None]
    expected = tuned.gradients(hidden, grad, mask)
    packed = mask.to(torch.uint8)
    bench.forward(hidden, None, packed, adapter=key(), keep="pass")
    for options in ({}, {"kept": "pass"}, {"kept": "pass", "release": True}):
        got, said = bench.call(
            protocol.RPC_BACKWARD_STREAM,
            *(hidden, grad, None, packed),
            states=[1],
            adapter=key(),
            **options,
        )
        assert sorted(said["adapter_grads"]) == sorted(tuned.parameters)
        named = dict(zip(said["adapter_grads"], got[2:], strict=True))
        ours = [*got[:2], *(named[name] for name in tuned.parameters)]
        for one, other in zip(ours, expected, strict=True):
            assert relative(one, other) < TOLERANCE
    # The blocks themselves are what they were.
    close(bench.forward(hidden)[0], run_blocks(bench.model, 1, 4, hidden)[-1])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert relative(ours, theirs) < TOLERANCE


def test_a_session_with_an_adapter(bench: Bench) -> None:
    tuned, hidden = Tuned(bench, "LoraConfig", r=4), random(2, 12, HIDDEN)
    tuned.upload()
    run, uid = bench.client.run, protocol.uid_chain(bench.folder.name, 1, 4)
    session = run(bench.client.session(bench.server.peer))
    pieces = [
        run(session.step(uid, hidden[:, begin:end], adapter=key(), max_length=20))[0]
        for begin, end in ((0, 9), (9, 10), (10, 12))
    ]
    close(torch.cat(pieces, dim=1), tuned.output(hidden))
    with pytest.raises(AdapterMissing):
        run(session.step(uid, hidden[:, :1], adapter=key(version=2)))
    session.close()


def test_a_new_version_takes_the_place_of_the_old_one(llama: Bench) -> None:
    tuned, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, HIDDEN)
    grad = random(2, 5, HIDDEN, seed=1)
    tuned.upload()
    close(llama.forward(hidden, adapter=key(), keep="old")[0], tuned.output(hidden))
    held = llama.info()["adapter_bytes_held"]
    with torch.no_grad():
        for parameter in tuned.parameters.values():
            parameter *= 1.5
    tuned.upload(version=2)
    assert llama.info()["adapter_bytes_held"] == held
    with pytest.raises(AdapterMissing, match="version 2 is here"):
        llama.forward(hidden, adapter=key(version=1))
    close(llama.forward(hidden, adapter=key(version=2))[0], tuned.output(hidden))
    got = llama.backward(hidden, grad, adapter=key(version=2), kept="old", release=True)
    close(got[0], tuned.gradients(hidden, grad)[0])
    for part in ((1, 2), (2, 4)):
        states = run_blocks(tuned.model, 1, 4, hidden)
        begin = hidden if part[0] == 1 else states[0].detach()
        names = llama.call(
            protocol.RPC_BACKWARD_STREAM, begin, grad, blocks=part, adapter=key(version=2)
        )[1]["adapter_grads"]
        assert {int(name.split(".")[0]) for name in names} == set(range(*part))


@pytest.fixture(scope="session")
def experts(benches: Benches) -> Bench:
    return benches["qwen3_moe"]


def test_lora_on_fused_experts(experts: Bench) -> None:
    """They are parameters, not modules; PEFT finds them by the names of old."""
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    tuned, hidden = Tuned(experts, "LoraConfig", r=2, target_modules=targets), random(2, 5, HIDDEN)
    assert any("experts" in name for name in tuned.parameters)
    tuned.upload("experts")
    close(experts.forward(hidden, adapter=key("experts"))[0], tuned.output(hidden))
    grad = random(2, 5, HIDDEN, seed=1)
    expected = tuned.gradients(hidden, grad)
    experts.forward(hidden, adapter=key("experts"), keep="experts")
    for options in ({}, {"kept": "experts", "release": True}):
        got, said = experts.call(
            protocol.RPC_BACKWARD_STREAM, hidden, grad, adapter=key("experts"), **options
        )
        named = dict(zip(said["adapter_grads"], got[1:], strict=True))
        for name, value in zip(tuned.parameters, expected[2:], strict=True):
            close(named[name], value)
    close(experts.forward(hidden)[0], run_blocks(experts.model, 1, 4, hidden)[-1])


def test_adapters_that_are_active_together(llama: Bench) -> None:
    import peft

    tuned, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, HIDDEN)
    second = peft.LoraConfig(r=2, target_modules=["k_proj", "q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(second, tuned.model, "second")
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in tuned.model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(["default", "second"])
    tuned.upload("both")
    close(llama.forward(hidden, adapter=key("both"))[0], tuned.output(hidden))
    grad = random(2, 5, HIDDEN, seed=1)
    got, said = llama.call(protocol.RPC_BACKWARD_STREAM, hidden, grad, adapter=key("both"))
    named = dict(zip(said["adapter_grads"], got[1:], strict=True))
    expected = tuned.gradients(hidden, grad)[2:]
    for name, value in zip(tuned.parameters, expected, strict=True):
        close(named[name], value)


def test_dropout_follows_from_the_seed(llama: Bench) -> None:
    tuned, hidden = Tuned(llama, "LoraConfig", r=4, lora_dropout=0.5), random(2, 5, HIDDEN)
    grad = random(2, 5, HIDDEN, seed=1)
    tuned.upload("drop")
    still = llama.forward(hidden, adapter=key("drop"))[0]
    close(still, tuned.output(hidden))
    train = {"adapter": key("drop"), "train": True}
    first, again, other = (llama.forward(hidden, **train, seed=seed)[0] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert relative(first, still) > 0.01
    assert relative(first, other) > 0.01
    # Masks belong to blocks: cut elsewhere, the same masks.
    begin = llama.forward(hidden, **train, seed=7, blocks=(1, 2))[0]
    close(llama.forward(begin, **train, seed=7, blocks=(2, 4))[0], first)
    llama.forward(hidden, **train, seed=7, keep="dropped")
    kept = llama.backward(hidden, grad, **train, seed=7, kept="dropped")
    anew = llama.backward(hidden, grad, **train, seed=7)
    wrong = llama.backward(hidden, grad, **train, seed=8, kept="dropped", release=True)
    for one, two in zip(kept, anew, strict=True):
        close(one, two)
    assert relative(wrong[0], anew[0]) > 0.01
    close(llama.forward(hidden, adapter=key("drop"))[0], still)


@pytest.fixture
def stranger(llama: Bench) -> Iterator[RawClient]:
    client = RawClient(llama.server.facts["maddrs"])
    yield client
    client.close()


def test_two_notebooks_with_the_same_id(llama: Bench, stranger: RawClient) -> None:
    ours, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, HIDDEN)
    theirs = Tuned(llama, "LoraConfig", seed=1, r=8)
    ours.upload("default")
    with pytest.raises(AdapterMissing):
        llama.forward(hidden, adapter=key("default"), client=stranger)
    theirs.upload("default", client=stranger)
    for _ in range(2):
        close(llama.forward(hidden, adapter=key("default"))[0], ours.output(hidden))
        got = llama.forward(hidden, adapter=key("default"), client=stranger)[0]
        close(got, theirs.output(hidden))
    # Neither sees what the other keeps.
    grad = random(2, 5, HIDDEN, seed=1)
    llama.forward(hidden, adapter=key("default"), keep="same")
    got = llama.backward(hidden, grad, adapter=key("default"), kept="same", client=stranger)
    close(got[0], theirs.gradients(hidden, grad)[0])
    llama.backward(hidden, grad, adapter=key("default"), kept="same", release=True)


def test_for_some_of_the_blocks(llama: Bench) -> None:
    tuned, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, HIDDEN)
    tuned.upload("part", blocks=(2, 3))
    with torch.no_grad():
        expected = run_blocks(tuned.model, 2, 3, hidden)[0]
    close(llama.forward(hidden, adapter=key("part"), blocks=(2, 3))[0], expected)
    with pytest.raises(AdapterMissing, match=r"blocks \[2, 3\) only"):
        llama.forward(hidden, adapter=key("part"))
    # An adapter that tunes none of the server's blocks is one as well.
    tuned.upload("none", packed=replace(tuned.adapter, blocks={}).packed(1, 4))
    close(llama.forward(hidden, adapter=key("none"))[0], llama.forward(hidden)[0])


def test_a_notebook_has_so_many_adapters(llama: Bench) -> None:
    tuned, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, HIDDEN)
    for index in range(9):
        tuned.upload(f"number {index}")
    with pytest.raises(AdapterMissing):
        llama.forward(hidden, adapter=key("number 0"))
    close(llama.forward(hidden, adapter=key("number 1"))[0], tuned.output(hidden))


def test_refused_keys(llama: Bench) -> None:
    for adapter in ("mine", {"id": "mine"}, {"id": "", "version": 1}, {"id": "x", "version": "1"}):
        with pytest.raises(BadRequest, match=r"adapter|version"):
            llama.forward(random(1, 2, HIDDEN), adapter=adapter)
