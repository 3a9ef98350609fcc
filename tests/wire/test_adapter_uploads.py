"""Hostile uploads: refused with a reason; the server stays as it was."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load, save
from support.bench import Bench, relative
from support.peft_adapters import Tuned, key, random
from support.raw_wire import RawClient

from swarm_notebook.errors import AdapterMissing, BadRequest, ServerBusy
from swarm_notebook.net.wire import protocol, tensors, traffic
from swarm_notebook.net.wire.message import PackedMessage
from swarm_notebook.net.wire.opening import open_stream
from swarm_notebook.net.wire.streams import Stream, StreamClosed


def hostile(tuned: Tuned) -> dict[str, tuple[dict[str, Any], type[Exception]]]:
    """Uploads that pass for ones of ``tuned`` at first sight."""
    file, text = tuned.adapter.packed(1, 4)
    good, said = load(file), json.loads(text)
    first = min(good)
    site = "self_attn.q_proj"

    def described(*path: str, value: Any) -> dict[str, Any]:
        changed = copy.deepcopy(said)
        place = changed["blocks"]
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        return {"packed": (file, json.dumps(changed).encode())}

    def attribute(name: str, value: Any) -> dict[str, Any]:
        return described("1", "layers", site, "attributes", name, value=value)

    def tensors(changed: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"packed": (save(changed), text)}

    large = {f"{first}{index}": torch.zeros(1 << 18) for index in range(5)}
    layer = ("1", "layers", site)
    cases = {
        "one shape": tensors({**good, first: torch.zeros(2, 3)}),
        "a tensor missing": tensors({name: good[name] for name in good if name != first}),
        "NaN": tensors({**good, first: torch.full_like(good[first], torch.nan)}),
        "truncated": {"packed": (file[:-5], text)},
        "larger than one may be": tensors({**good, **large}),
        "no description": {"packed": (file, b"[]")},
        "another PEFT": {"packed": (file, json.dumps({**said, "peft": "0.3.0"}).encode())},
        "another block": described("0", value=said["blocks"]["1"]),
        "an unknown module": described("1", "layers", value={"self_attn.x_proj": "base"}),
        "the block itself": described("1", "layers", value={"": "base"}),
        "no layer at all": described(*layer, value="base"),
        "a class of anybody": described(*layer, "class", value="subprocess.Popen"),
        "a class that is imported": described(*layer, "class", value="peft.tuners.lora.layer.math"),
        "a whole tuner": described(*layer, "class", value="peft.tuners.lora.model.LoraModel"),
        "a plain module": described(*layer, "class", value="torch.nn.modules.linear.Identity"),
        "a forward": attribute("forward", "x"),
        "a table of torch": attribute("_modules", {"dict": []}),
        "hooks": attribute("_forward_hooks", {"dict": []}),
        "merged": attribute("merged_adapters", ["default"]),
        "switched off": attribute("_disable_adapters", True),
        "a huge number": attribute("r", 1 << 40),
        "an object": attribute("r", {"object": "builtins.object"}),
        "a tensor of nobody": attribute("r", {"tensor": "x"}),
        "deep values": attribute("r", json.loads("[" * 40 + "]" * 40)),
        "a tag of nobody": attribute("r", {"eval": "1"}),
        "training a buffer that is not": described("1", "trained", value=["x"]),
        "blocks that are not here": {"blocks": (0, 4)},
        "no version": {"version": None},
        # The last one: what is read for nothing counts like many refusals.
        "larger than is received": {"packed": (bytes(90 << 20), text)},
    }
    return {name: (changes, BadRequest) for name, changes in cases.items()}


def test_hostile_uploads_leave_the_server_as_it_was(llama_process: Bench) -> None:
    llama = llama_process
    tuned, hidden = Tuned(llama, "LoraConfig", r=4), random(2, 5, 48)
    tuned.upload("honest")
    expected = llama.forward(hidden, adapter=key("honest"))[0]
    session = llama.client.run(llama.client.session(llama.server.peer))
    uid = protocol.uid_chain("tiny-llama", 1, 4)
    process = psutil.Process(llama.server.facts["pid"])

    def all_once() -> None:
        # Whoever is refused very often is heard late: each time somebody else.
        evil = RawClient(llama.server.facts["maddrs"])
        for name, (changes, error) in hostile(tuned).items():
            with pytest.raises(error):
                pytest.fail(f"{name}: {tuned.upload('evil', client=evil, **changes)}")
            with pytest.raises(AdapterMissing):
                llama.forward(hidden, adapter=key("evil"), client=evil)
            got = llama.client.run(
                session.step(
                    uid, hidden, adapter=key("honest"), start_from_position=0, max_length=9
                )
            )[0]
            assert relative(got, expected) < 1e-4, name
        evil.close()

    all_once()
    before, held = process.memory_info().rss, llama.info()["adapter_bytes_held"]
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
                await stream.send(PackedMessage(uid="x", tensors=[part]))
            await asyncio.sleep(0.5)
            await stream.send_end()
            await stream.receive()
        finally:
            stream.close()

    found = llama.client.run(work())
    assert all(isinstance(error, (BadRequest, ServerBusy, StreamClosed)) for error in found)
    assert not all(isinstance(error, BadRequest) for error in found)
    # What was counted is given back.
    assert Tuned(llama, "LoraConfig", r=4).upload("after")[1]["ok"]
