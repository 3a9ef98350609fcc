"""A real Petals (its last release) on the other side of the wire: servers, and its client.

    python -m pytest --noconftest -p no:cacheprovider tests/foreign/petals_both_ways.py

`make foreign` installs it (`install-petals`) and says where it is by ``PETALS``.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from foreign.petals_servers import PYTHON, PetalsServer, environment, petals
from support.hosting import HostedServer, HostedSwarm
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.server.options import ServeOptions

BLOCKS = 6
LENGTH = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
CLIENT = Path(__file__).with_name("petals_client.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that Petals' transformers reads, too."""
    path = tiny_model(
        "llama",
        tmp_path_factory.mktemp("petals"),
        head_dim=12,
        num_hidden_layers=BLOCKS,
        max_position_embeddings=4096,
    )
    config = json.loads((path / "config.json").read_text())
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@dataclass
class Both:
    """A remote model on servers of which some or all are Petals', and the local one."""

    swarm: Any
    local: Any
    servers: list[PetalsServer]

    @property
    def models(self) -> tuple[Any, Any]:
        return self.swarm.model, self.local


@pytest.fixture(scope="module", params=["Petals alone", "Petals and ours"])
def both(request: Any, folder: Path, tmp_path_factory: Any) -> Iterator[Both]:
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    local = local.eval().requires_grad_(False)
    alone = request.param == "Petals alone"
    spans = [(0, 3), (3, BLOCKS)] if alone else [(0, 3)]
    with ExitStack() as stack:
        logs = tmp_path_factory.mktemp("logs")
        servers = stack.enter_context(petals(folder, logs, *spans))
        peers = [servers[0].address]
        if not alone:
            options = ServeOptions(model=str(folder), blocks=(3, BLOCKS), initial_peers=peers)
            stack.enter_context(HostedServer(options))
        yield Both(stack.enter_context(sn.connect(peers, model=folder)), local, servers)


def some_ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(rows))


def same(both: Both, use: Callable[[Any], Any]) -> None:
    ours, theirs = [use(copy.deepcopy(model)) for model in both.models]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_logits_and_hidden_states(both: Both) -> None:
    same(both, lambda m: list(m(some_ids(), output_hidden_states=True).hidden_states))
    same(both, lambda m: m(some_ids()).logits)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generation(both: Both, options: dict[str, Any]) -> None:
    same(both, lambda m: m.generate(some_ids(), **LENGTH, **options))


def test_prompt_lookup(both: Both) -> None:
    repeated = some_ids(1).repeat(1, 2)
    same(both, lambda m: m.generate(repeated, prompt_lookup_num_tokens=3, **LENGTH))


def test_a_padded_batch(both: Both) -> None:
    mask = torch.ones_like(some_ids())
    mask[0, :4] = 0
    same(both, lambda m: m.generate(some_ids(), attention_mask=mask, **LENGTH))


def test_hooks_that_write(both: Both) -> None:
    def use(model: Any) -> torch.Tensor:
        model.model.layers[1].register_forward_hook(lambda _m, _i, output: output * 1.2)
        model.model.layers[4].register_forward_hook(lambda _m, _i, output: output * 0.9)
        return model.generate(some_ids(), **LENGTH)

    same(both, use)


@torch.no_grad()
def test_what_was_computed_is_taken_back(both: Both) -> None:
    def use(model: Any) -> list[torch.Tensor]:
        cache = model(some_ids(), use_cache=True).past_key_values
        cache.crop(-4)
        again = model(some_ids()[:, 3:6], past_key_values=cache).logits
        cache.batch_select_indices(torch.tensor([1]))
        twin = copy.deepcopy(cache)
        return [
            again,
            *(model(some_ids()[1:], past_key_values=one).logits for one in (cache, twin)),
        ]

    same(both, use)


def test_gradients_and_deep_prompts(both: Both) -> None:
    def use(model: Any) -> torch.Tensor:
        embedded = model.get_input_embeddings()(some_ids()).detach().clone().requires_grad_(True)
        out = model(inputs_embeds=embedded, output_hidden_states=True)
        (out.logits.square().mean() + out.hidden_states[2].square().mean()).backward()
        return embedded.grad

    same(both, use)


def test_much_at_once(both: Both) -> None:
    """Above a MiB requests travel in parts."""
    many = some_ids(32, 180)
    same(both, lambda m: m(many, use_cache=False).logits.detach())


@torch.no_grad()
def test_more_than_a_cache_was_reserved_for(both: Both) -> None:
    def use(model: Any) -> torch.Tensor:
        cache = model.new_cache(max_length=8) if model is not both.local else None
        first = model(some_ids(), past_key_values=cache, use_cache=True)
        return model(some_ids(2, 30), past_key_values=first.past_key_values).logits

    ours, theirs = use(both.swarm.model), use(both.local)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_more_than_2048_tokens_in_a_cache_of_ones_own(both: Both) -> None:
    """Nobody said how many it would be, and so many were reserved."""

    def use(model: Any) -> list[torch.Tensor]:
        ids = some_ids(1, 2200)
        out = model(ids[:, :2040], use_cache=True)
        found = [out.logits[:, -1]]
        for part in (ids[:, 2040:2047], ids[:, 2047:2049], ids[:, 2049:]):
            out = model(part, past_key_values=out.past_key_values)
            found.append(out.logits)
        return found

    before = both.swarm.route().hops
    same(both, use)
    assert [hop.peer_id for hop in both.swarm.route().hops] == [hop.peer_id for hop in before]


def test_a_name_that_nobody_serves(both: Both, folder: Path, tmp_path: Path) -> None:
    """It is said when the time is over, not much later."""
    other = shutil.copytree(folder, tmp_path / "another-name")
    began = time.monotonic()
    with pytest.raises(sn.errors.ModelNotServed, match="another-name"):
        sn.connect([both.servers[0].address], model=other, timeout=4)
    assert time.monotonic() - began < 20


def test_a_block_at_home(both: Both) -> None:
    both.swarm.own(1)
    try:
        same(both, lambda m: m.generate(some_ids(), **LENGTH))
    finally:
        both.swarm.release()


def test_what_petals_lacks_is_refused(both: Both) -> None:
    model = copy.deepcopy(both.swarm.model)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(sn.errors.Unsupported, match=r"swarm\.own"):
        model(some_ids())
    handle.remove()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    with pytest.raises(sn.errors.Unsupported, match=r"swarm\.own"):
        wrapped(some_ids())


def test_its_cache_and_state_are_read(both: Both) -> None:
    rows = [row for row in both.swarm.status().servers if (row.version or "").startswith("2.2.0")]
    assert len(rows) == len(both.servers)
    assert all(row.state == "online" and row.cache_left for row in rows)


def test_a_server_that_dies_is_replaced(folder: Path, tmp_path: Path) -> None:
    local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spans = [(0, 3), (3, BLOCKS), (3, BLOCKS)]
    with (
        petals(folder, tmp_path, *spans) as servers,
        sn.connect([servers[0].address], model=folder) as swarm,
    ):
        out = swarm.model.generate(some_ids(), **LENGTH)
        used = swarm.route().hops[-1].peer_id
        victim = next(one for one in servers if used in one.log.read_text())
        cut = out[:, :-4]
        cache = swarm.model(cut[:, :-1], use_cache=True).past_key_values
        victim.kill()
        ours = swarm.model.generate(cut, past_key_values=cache, **LENGTH)
    assert ours.tolist() == local.generate(cut, **LENGTH).tolist()


def test_petals_client_on_our_servers(folder: Path) -> None:
    with HostedSwarm(folder, [(0, 3), (3, BLOCKS)]) as servers:
        done = subprocess.run(
            [PYTHON, "-W", "ignore", CLIENT, folder, folder.name, *servers.initial_peers],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 8, done.stderr[-2000:]
    assert all(result is True for result in found.values()), found
