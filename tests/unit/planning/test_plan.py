"""Plans from configs alone: what fits, where, and how fast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.tiny import FAMILIES, build, tiny_config, tiny_model

from swarm_notebook import cli
from swarm_notebook.errors import ContextTooLong, ModelNotFound, PlanError
from swarm_notebook.planning import measure
from swarm_notebook.planning.machines import Link, card, machine, other, read_link
from swarm_notebook.planning.placement import Demand, step_seconds
from swarm_notebook.planning.plan import LAN, plan, plan_shape
from swarm_notebook.planning.shape import BlockShape, ModelShape, read_shape, shape_of

MILLION = 1_000_000


def model(blocks: int, matrices: int = 100 * MILLION) -> ModelShape:
    one = BlockShape(matrices, 0, 1000, 2048)
    return ModelShape("model", (one,) * blocks, 4096, 10 * MILLION, 10 * MILLION, 8192)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_counts_what_the_model_has(family: str) -> None:
    import torch

    made = build(family)
    shape = shape_of(tiny_config(family), name=family)
    assert shape.parameters == sum(p.numel() for p in made.parameters())
    with torch.inference_mode():
        cache = made(torch.arange(3)[None] + 3, use_cache=True).past_key_values
    kept = [layer.keys[:, :, :1].numel() + layer.values[:, :, :1].numel() for layer in cache.layers]
    assert [block.cache for block in shape.blocks] == kept
    assert shape.chosen == (0.5 if "moe" in family or family in ("mixtral", "gpt_oss") else 1.0)


def test_a_folder_says_how_its_weights_are_stored(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    assert read_shape(folder).stored_bits == 32
    (folder / "model.safetensors").unlink()
    assert read_shape(folder / "config.json").stored_bits is None
    assert read_shape(folder) == read_shape(folder / "config.json")
    with pytest.raises(ModelNotFound):
        read_shape(tmp_path / "nothing")


def test_a_header_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    for content in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x40" + b"\0" * 7 + b"{"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelNotFound, match="not a readable safetensors file"):
            read_shape(folder)


def test_machines_are_named_or_described() -> None:
    assert machine("RTX 3090").memory == 24_000_000_000
    assert machine("m2-max:64GB").memory == 64_000_000_000
    assert machine("m2-max:64GB").bandwidth == machine("m2-max").bandwidth
    laptop = machine("laptop:16GiB:60GB/s:1TFLOPS")
    assert (laptop.memory, laptop.bandwidth, laptop.operations) == (16 << 30, 60e9, 1e12)
    assert read_link("50ms:100Mbit/s") == Link(0.05, 12.5e6)
    for text in (
        "abacus",
        "abacus:16GB",
        "laptop:much:60GB/s",
        "laptop:1GB:60",
        "h100:1GB:1GB/s:2:3",
    ):
        with pytest.raises(PlanError):
            machine(text)
    with pytest.raises(PlanError, match="50ms"):
        read_link("soon")


def test_blocks_go_where_they_are_fastest() -> None:
    slow, fast = other("slow", int(8e9), 20e9), card("fast", 3.5, 900, 70, "test")
    found = plan_shape(model(40), [slow, fast], Demand(1024, 1), LAN)
    by_name = {share.machine.name: share.end - share.start for share in found.shares}
    assert found.fits
    assert sum(by_name.values()) == 40
    assert by_name["fast"] == max(
        count
        for count in range(41)
        if count * (found.shares[0].weights + found.shares[0].cache) / by_name["fast"] <= fast.room
    )
    assert all(share.memory <= share.machine.room for share in found.shares)
    # A machine that is not needed has no blocks: a hop costs more than it brings.
    alone = plan_shape(model(4), [slow, fast], Demand(1024, 1), LAN)
    assert [share.machine.name for share in alone.shares] == ["fast"]


def test_fewer_bits_where_the_model_does_not_fit_otherwise() -> None:
    one = card("card", 6, 900, 70, "test")
    found = plan_shape(model(40), [one], Demand(1024, 1), LAN)
    assert found.bits == 8.5
    assert found.shares[0].bits == 8.5
    assert "another card: whole weights instead of 8.5 bits" in found.one_more
    assert found.commands("org/name") == ["swarm-notebook serve org/name --blocks 0:40 --bits 8.5"]
    few = plan_shape(model(40), [one], Demand(1024, 1), LAN, bits=3)
    assert few.shares[0].bits == 3
    assert few.parts != found.parts
    assert few.shares[0].weights < found.shares[0].weights / 2
    assert few.cache_per_session == 40 * 1024 * 2048 * 2


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    small = card("card", 3, 900, 70, "test")
    found = plan_shape(model(400), [small], Demand(1024, 1), LAN)
    assert not found.fits
    assert found.missing > 10e9
    assert found.tokens_per_second == 0
    assert "does not fit" in repr(found)
    more = int(found.one_more.split()[2])
    assert plan_shape(model(400), [small] * (1 + more), Demand(1024, 1), LAN).fits
    assert not plan_shape(model(400), [small] * more, Demand(1024, 1), LAN).fits
    assert "does not fit" in found.as_html()


def test_a_step_takes_what_its_parts_take() -> None:
    one = card("card", 24, 1000, 100, "test")
    found = plan_shape(model(10), [one], Demand(2048, 8), LAN)
    (share,) = found.shares
    reading = 10 * (100 * MILLION + 1000) * 2 / (1e12 * one.reached)
    kept = 10 * 1024 * 2048 * 2 / 1e12
    assert step_seconds(found.shape, share, 1, 1024, None) == pytest.approx(
        reading + kept + 10 * one.block_seconds
    )
    assert found.tokens_per_second == pytest.approx(1 / sum(found.parts.values()))
    assert found.many_tokens_per_second > 4 * found.tokens_per_second


def test_few_bits_help_one_stream_of_a_card_and_hardly_a_crowd() -> None:
    """As on an H200: 2.8 and 4.9 ms of 32 blocks for one row, 6.3 to 6.6 and 5.9 to 6.6 for 32."""
    shape = model(32, 218 * MILLION)
    floats, packed = (
        plan_shape(shape, [machine("h200")], Demand(512, 1), LAN, bits).shares[0]
        for bits in (None, 4.5)
    )
    for rows, least, most in ((1, 1.5, 2), (32, 0.75, 1)):
        whole, few = (step_seconds(shape, one, rows, 0, None) for one in (floats, packed))
        assert least < whole / few < most


def test_streams_together_are_those_of_the_plan_itself() -> None:
    """Also of a plan that was made of another one: none keeps the rate of fewer streams."""
    one = card("card", 24, 1000, 100, "test")
    alone = plan_shape(model(10), [one], Demand(2048, 1), LAN)
    assert alone.many_tokens_per_second == alone.tokens_per_second
    shared = plan_shape(model(10), [one], Demand(2048, 8), LAN)
    again = replace(alone, demand=shared.demand)
    assert again.many_tokens_per_second == shared.many_tokens_per_second
    assert plan_shape(model(400), [one], Demand(2048, 8), LAN).many_tokens_per_second == 0


def test_experts_are_read_as_far_as_tokens_go_through_them() -> None:
    block = BlockShape(100, 80, 0, 8)
    shape = ModelShape("m", (block,), 8, 0, 0, None, chosen=0.25)
    assert shape.multiplied(block) == 40
    assert shape.read(block, 1) == 40
    assert 40 < shape.read(block, 4) < 100


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    config = tiny_config("llama")
    for options, message in (
        ({"bits": 1}, "2.5 to 16"),
        ({"sessions": 0}, "sessions"),
        ({"sessions": 10**9}, "sessions: 1,000,000,000, at most 10,000"),
        ({"machines": []}, "none are given"),
    ):
        with pytest.raises(PlanError, match=message):
            plan(config, **{"machines": ["h100"], **options})
    with pytest.raises(ContextTooLong):
        plan(config, ["h100"], context=100_000)


def test_the_command_line_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny_model("llama", tmp_path))
    options: list[Any] = ["--machine", "rtx3090", "--machine", "box:8GB:20GB/s", "--context", "64"]
    assert cli.main(["plan", folder, *options, "--link", "50ms:100Mbit/s"]) == 0
    printed = capsys.readouterr().out
    assert "tiny-llama: fits" in printed
    assert f"$ swarm-notebook serve {folder} --blocks 0:5" in printed
    assert cli.main(["plan", folder, "--machine", "tiny:930MB:1GB/s", "--context", "64"]) == 1
    assert cli.main(["plan", folder, "--machine", "abacus"]) == 1
    assert "abacus" in capsys.readouterr().err


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "_WIDTHS", (64, 128, 192))
    monkeypatch.setattr(measure, "_TRIES", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = measure.this_machine("here")
    assert (here.name, here.kind) == ("here", "cpu")
    assert here.memory == psutil.virtual_memory().total
    # What is measured explains itself: no block is free, none takes a second.
    assert 1e6 < here.bandwidth < 1e13
    assert 1e6 < here.operations < 1e15
    assert 0 <= here.block_seconds < 1
