"""Hostile uploads: refused with a reason; the server stays as it was."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import psutil
import pytest
import torch
from hivemind.proto import runtime_pb2
from safetensors.torch import save
from support.bench import Bench, relative
from support.peft_adapters import Tuned, key, random

from swarm_notebook.errors import AdapterMissing, BadRequest, ServerBusy
from swarm_notebook.net import protocol, tensors, traffic
from swarm_notebook.net.streams import Stream, StreamClosed, open_stream


def lora_config(tuned: Tuned, **fields: Any) -> dict[str, str]:
    return {"default": json.dumps({**json.loads(tuned.configs["default"]), **fields})}


def hostile(tuned: Tuned) -> dict[str, tuple[dict[str, Any], type[Exception]]]:
    """Uploads that pass for ones of ``tuned`` at first sight."""
    good = {name: value.detach() for name, value in tuned.parameters.items()}
    first = min(good)
    without = {name: value for name, value in good.items() if name != first}
    nan = {**good, first: torch.full_like(good[first], torch.nan)}
    wide = {
        name: torch.zeros(*(64 if size == 4 else size for size in value.shape))
        for name, value in good.items()
    }
    large = {f"{first}{index}": torch.zeros(1 << 18) for index in range(5)}
    unknown = {**good, first.replace("down_proj", "x_proj"): good[first].clone()}
    return {
        "rank beyond the limit": (
            {"tensors": wide, "configs": lora_config(tuned, r=64)},
            BadRequest,
        ),
        "rank other than the config's": ({"tensors": wide}, BadRequest),
        "one shape": ({"tensors": {**good, first: good[first].T}}, BadRequest),
        "a parameter missing": ({"tensors": without}, BadRequest),
        "a base parameter": (
            {
                "tensors": {
                    **good,
                    "model.layers.1.self_attn.q_proj.base_layer.weight": torch.eye(2),
                }
            },
            BadRequest,
        ),
        "another block": (
            {
                "tensors": {
                    name.replace("layers.1.", "layers.0."): value for name, value in good.items()
                }
            },
            BadRequest,
        ),
        "an unknown module": ({"tensors": unknown}, BadRequest),
        "NaN": ({"tensors": nan}, BadRequest),
        "truncated": ({"file": save(good)[:-5]}, BadRequest),
        "larger than one may be": ({"tensors": large}, BadRequest),
        "larger than is received": ({"file": bytes(90 << 20)}, BadRequest),
        "another prefix": ({"prefix": "transformer.h"}, BadRequest),
        "a prefix of no name": ({"prefix": "a..b"}, BadRequest),
        "blocks that are not here": ({"blocks": (0, 4)}, BadRequest),
        "derived from nothing": ({"tensors": without, "derive": [first]}, BadRequest),
        "derived and uploaded": ({"derive": [first]}, BadRequest),
        "derive of no names": ({"derive": [3]}, BadRequest),
        "another config": ({"configs": lora_config(tuned, peft_type="VERA")}, BadRequest),
        "a hidden module": (
            {"tensors": {**good, "model.layers.1.lora_A.default.weight": torch.ones(4)}},
            BadRequest,
        ),
        "no version": ({"version": None}, BadRequest),
    }


def test_hostile_uploads_leave_the_server_as_it_was(llama_process: Bench) -> None:
    llama = llama_process
    tuned, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, 48)
    tuned.upload("honest")
    expected = llama.forward(hidden, adapter=key("honest"))[0]
    session = llama.client.run(llama.client.session(llama.server.peer))
    uid = protocol.uid_chain("tiny-llama", 1, 4)
    process = psutil.Process(llama.server.facts["pid"])

    def all_once() -> None:
        for name, (changes, error) in hostile(tuned).items():
            with pytest.raises(error):
                pytest.fail(f"{name}: {tuned.upload('evil', **changes)}")
            with pytest.raises(AdapterMissing):
                llama.forward(hidden, adapter=key("evil"))
            got = llama.client.run(
                session.step(
                    uid, hidden, adapter=key("honest"), start_from_position=0, max_length=9
                )
            )[0]
            assert relative(got, expected) < 1e-4, name

    all_once()
    before, held = process.memory_info().rss, llama.info()["adapter_bytes_held"]
    for _ in range(2):
        all_once()
    assert llama.info()["adapter_bytes_held"] == held
    assert process.memory_info().rss - before < 24 << 20
    session.close()


def test_many_adapters_stay_within_the_budget(llama: Bench) -> None:
    tuned = Tuned(llama, "LoraConfig", r=32)
    numbers, sizes = [], []
    for index in range(20):
        tuned.upload(f"number {index}")
        info = llama.info()
        numbers.append(info["adapters"])
        sizes.append(info["adapter_bytes_held"])
    assert numbers[8:] == numbers[8:9] * 12
    assert max(sizes) <= 2 * info["adapter_bytes"]  # of this notebook, and of a test's stranger
    assert sizes[-1] == sizes[8]


def test_uploads_at_once_are_bounded_together(
    llama: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes count when they arrive, not when they are understood."""
    monkeypatch.setattr(traffic, "WAIT_SECONDS", 1.0)

    async def work() -> list[BaseException | None]:
        streams = [
            await open_stream(llama.client.node.p2p, llama.server.peer, protocol.RPC_ADAPTER)
            for _ in range(3)
        ]
        return list(await asyncio.gather(*map(send, streams), return_exceptions=True))

    async def send(stream: Stream) -> None:
        part = tensors.pack(torch.zeros(4 << 20, dtype=torch.uint8))
        try:
            for _ in range(10):  # 40 MB; one upload may have 72
                await stream.send(runtime_pb2.ExpertRequest(uid="x", tensors=[part]))
            await asyncio.sleep(0.5)
            await stream.send_end()
            await stream.receive(runtime_pb2.ExpertResponse)
        finally:
            stream.close()

    found = llama.client.run(work())
    assert all(isinstance(error, (BadRequest, ServerBusy, StreamClosed)) for error in found)
    assert not all(isinstance(error, BadRequest) for error in found)
    # What was counted is given back.
    assert Tuned(llama, "LoraConfig", r=4).upload("after")[1]["ok"]
