"""Servers whose weights have few bits are audited where somebody has the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support import liars
from support.gguf_files import write_gguf
from support.hosting import HostedServer, HostedSwarm
from support.patience import PATIENCE
from support.quantised import WIDE, awq, gptq, written
from support.tiny import build, tiny_model

import swarm_notebook as sn
from swarm_notebook.check import check
from swarm_notebook.checkpoint.packed import PackedWeight
from swarm_notebook.net.dht.records import ServerInfo
from swarm_notebook.report.audit import AuditTable
from swarm_notebook.server import app
from swarm_notebook.server.engine.quantising import loading
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence import announce
from swarm_notebook.swarm import Swarm

TOKENS = 48
# In halves every second pass is audited, as each audit takes two: enough for one to be drawn.
MANY = 40
IN_GROUPS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def packed(
    tmp_path_factory: pytest.TempPathFactory,
    cache: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[HostedSwarm]:
    """Three servers with the same bits."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("models"), **IN_GROUPS)
    with (
        HostedSwarm(folder, [(0, 5)] * 3, bits=4.5, dtype=request.param) as swarm,
        swarm.with_a_node(),
    ):
        yield swarm


def connected(local: HostedSwarm, **options: Any) -> Swarm:
    return sn.connect(local.initial_peers, model=local.model, min_bits=2, **options)


def ask(swarm: Swarm, seed: int = 0) -> None:
    ids = torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    swarm.model(ids, use_cache=False)
    swarm.model.generate(ids, max_new_tokens=8, do_sample=False)


def asked_until(swarm: Swarm, count: int, *, alone: bool = False) -> AuditTable:
    """Asks until so many answers were audited; of a server that is `alone`, one at a time."""
    for seed in range(MANY):
        if alone:  # once it was found to be wrong, nobody answers any more
            swarm.model(torch.full((1, TOKENS), 3 + seed), use_cache=False)
        else:
            ask(swarm, seed)
        table = swarm.audit(wait=PATIENCE)
        if len(table.verdicts) >= count:
            return table
    raise AssertionError(f"fewer than {count} audits")


def test_honest_ones_agree(packed: HostedSwarm) -> None:
    with connected(packed, verify=1.0) as swarm:
        verdicts = asked_until(swarm, 4).verdicts
    assert {one.outcome for one in verdicts} == {"agreed"}


@pytest.mark.parametrize("lie", ["2 % too long", "a skipped block", "stale"])
def test_a_liar_is_found_by_two_others(packed: HostedSwarm, tmp_path: Path, lie: str) -> None:
    with connected(packed, verify=1.0, verify_here=True) as swarm:
        liar = packed.next_of(swarm)
        others = {server.name for server in packed.servers if server is not liar}
        with liars.lying(liar, liars.LIES[lie]):
            table = asked_until(swarm, 1)
        assert table.wrong == (liar.peer_id,)
        for one in table.verdicts:
            assert "this notebook" not in one.by  # its weights are others
        proven = [one for one in table.verdicts if one.proof is not None]
        if proven:  # or it was found as a witness
            assert set(proven[0].by) == others
            findings = check(table.export(tmp_path / "record.safetensors"))
            assert {one.outcome for one in findings} == {"undecided"}
            assert all("packed" in one.why for one in findings)


def test_gradients_are_audited(packed: HostedSwarm) -> None:
    with connected(packed, verify=1.0) as swarm:
        found: set[tuple[bool, str]] = set()
        for _ in range(MANY):
            states = torch.randn(1, TOKENS, 64, dtype=swarm.model.dtype, requires_grad=True)
            swarm.model(inputs_embeds=states, use_cache=False).logits.sum().backward()
            found = {(one.back, one.outcome) for one in swarm.audit(wait=PATIENCE).verdicts}
            if len(found) > 1:
                break
    assert found == {(False, "agreed"), (True, "agreed")}


def test_nobody_has_the_same_bits(cache: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, **IN_GROUPS)
    with HostedSwarm(folder, [(0, 5)], bits=4.5, dtype="float32") as local:
        other = ServeOptions(local.model, (0, 5), local.initial_peers, dtype="float32", bits=8.5)
        with HostedServer(other), connected(local, verify=1.0, verify_here=True) as swarm:
            table = asked_until(swarm, 1)
    assert {one.outcome for one in table.verdicts} == {"open"}
    assert "packed to the same bits" in str(table)


def test_who_does_not_say_which_bits_it_has_is_left_open(
    cache: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Petals' quantised servers."""

    def silent(*given: Any, **more: Any) -> ServerInfo:
        return announce.describe(*given, **more).model_copy(update={"packing": None})

    monkeypatch.setattr(app, "describe", silent)
    folder = tiny_model("llama", tmp_path, **IN_GROUPS)
    with HostedSwarm(folder, [(0, 5)], bits=4.5) as local, connected(local, verify=1.0) as swarm:
        for seed in range(3):
            ask(swarm, seed)
        (one,) = swarm.audit(wait=PATIENCE).verdicts
    assert one.outcome == "open"
    assert "does not say which values its weights have" in one.why


def as_published(folder: Path, method: str) -> Path:
    """A checkpoint whose weights are quantised by a method that people publish."""
    if method == "gguf":
        path = folder / "tiny.gguf"
        kind = gguf.GGMLQuantizationType.Q4_0
        write_gguf(path, build("llama", num_hidden_layers=4, **IN_GROUPS), "llama", kind=kind)
        return path
    path = tiny_model("llama", folder, **WIDE)
    config: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": 32}
    if method == "awq":
        written(path, awq, **config, version="gemm", zero_point=True)
    else:
        written(path, gptq(act_order=True), **config, desc_act=True, sym=False)
    return path


@pytest.mark.parametrize("method", ["gguf", "gptq", "awq"])
def test_bits_as_they_were_published_are_those_of_unpacked_servers(
    cache: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    """One server holds the file's bits, the other one what they stand for."""
    free = 0
    cache.setattr(loading, "free_memory", lambda _device: free)
    with HostedSwarm(as_published(tmp_path, method), [(0, 4)], dtype="bfloat16") as local:
        parameters = [one for layer in local.servers[0].layers for one in layer.parameters()]
        assert any(isinstance(one, PackedWeight) for one in parameters)
        free = 1 << 40
        other = ServeOptions(local.model, (0, 4), local.initial_peers, dtype="bfloat16")
        with HostedServer(other) as unpacked, connected(local, verify=1.0) as swarm:
            verdicts = asked_until(swarm, 3).verdicts
            assert {one.outcome for one in verdicts} == {"agreed"}
            names = {one.name for one in verdicts}.union(*(one.by for one in verdicts))
            assert len(names) == 2
            assert unpacked.peer_id
        with connected(local, verify=1.0, verify_here=True) as swarm:
            with liars.lying(local.servers[0], liars.LIES["2 % too long"]):
                table = asked_until(swarm, 1, alone=True)
            assert table.wrong == (local.servers[0].peer_id,)
            assert table.verdicts[0].by == ("this notebook",)
