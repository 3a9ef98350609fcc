"""Servers that lie are found, named and left; honest ones are not blamed."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from support import liars
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook import cli
from swarm_notebook.check import check
from swarm_notebook.client.audit import limits
from swarm_notebook.client.audit.verdicts import Verdict
from swarm_notebook.client.request import Request
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.writer import StepRoute
from swarm_notebook.errors import BadRequest, OtherCheckpoint
from swarm_notebook.report.audit import AuditTable
from swarm_notebook.swarm import Swarm
from swarm_notebook.widgets import ChatWidget, GenerateWidget

TOKENS = 48


@contextmanager
def connected(local: HostedSwarm, **options: object) -> Iterator[Swarm]:
    with sn.connect(local.initial_peers, model=local.model, **options) as swarm:  # type: ignore[arg-type]
        yield swarm


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


def found(swarm: Swarm) -> AuditTable:
    return swarm.audit(wait=PATIENCE)


@pytest.mark.parametrize("lie", liars.LIES)
def test_a_liar_is_found_by_its_first_audit(trio: HostedSwarm, lie: str) -> None:
    with connected(trio, verify=1.0) as swarm:
        liar = trio.next_of(swarm)
        with liars.lying(liar, liars.LIES[lie]):
            swarm.model(ids(), use_cache=False)
            table = found(swarm)
        assert table.wrong == (liar.peer_id,)
        assert [one.outcome for one in table.verdicts] == ["wrong"]
        assert len(table.verdicts[0].by) == 2
        assert swarm.route().hops[0].peer_id != liar.peer_id
        row = next(row for row in swarm.status().servers if row.peer_id == liar.peer_id)
        assert row.state == row.condition == "found wrong"
        assert f"by {table.verdicts[0].by[0]}" in row.note
        assert row.audits == (0, 1, 0)


def test_a_liar_is_found_while_only_a_part_of_its_answer_travels(trio: HostedSwarm) -> None:
    with connected(trio, verify=1.0) as swarm:
        liar = trio.next_of(swarm)
        with liars.lying(liar, liars.LIES["a skipped block"]):
            swarm.model.generate(ids(), max_new_tokens=1, do_sample=False)
            table = found(swarm)
        assert table.wrong == (liar.peer_id,)
        # What did not come back is not compared, and fewer than this are not either.
        assert table.verdicts[0].tokens == limits.MIN_TOKENS


def test_few_prompts_are_asked_for_more_than_they_need(
    trio: HostedSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new server is, and then so many prompts that it adds a percent to what travels."""
    asked: list[int] = []
    send = Hop.send

    async def counted(self: Hop, request: Request, route: StepRoute) -> float:
        asked.append(request.output_shape[1])
        return await send(self, request, route)

    monkeypatch.setattr(Hop, "send", counted)
    with connected(trio, verify=1.0) as swarm:
        for seed in range(61):
            swarm.model.generate(ids(seed), max_new_tokens=1, do_sample=False)
            found(swarm)
    assert asked[0] == limits.MIN_TOKENS
    # Once in 60 prompts of 48 tokens; nine times are a chance of one in a million.
    assert len(asked) == 61
    assert sum(asked[1:]) - 60 < 9 * (limits.MIN_TOKENS - 1)


def test_a_batch_needs_fewer_of_each_row(trio: HostedSwarm) -> None:
    with connected(trio, verify=1.0) as swarm:
        prompt = ids().expand(4, -1)
        swarm.model.generate(prompt, max_new_tokens=1, do_sample=False)
        (verdict,) = found(swarm).verdicts
    assert (verdict.outcome, verdict.tokens) == ("agreed", limits.MIN_TOKENS)


def test_a_wrong_answer_is_kept_and_replayed_by_others(
    trio: HostedSwarm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.safetensors"
    with connected(trio, verify=1.0) as swarm:
        with pytest.raises(ValueError, match="nothing to prove"):
            swarm.audit().export(file)
        liar = trio.next_of(swarm)
        with liars.lying(liar, liars.LIES["2 % too long"]):
            swarm.model(ids(), use_cache=False)
            found(swarm).export(file)
        hashed = found(swarm).export(tmp_path / "hashed.safetensors", states=False)
    assert cli.main(["check", str(file)]) == 0
    said = capsys.readouterr().out
    assert liar.peer_id in said
    assert "confirmed: mean error" in said
    # Somebody else has the weights elsewhere; with others nothing can be said.
    elsewhere = shutil.copytree(trio.model, tmp_path / "elsewhere")
    assert [one.outcome for one in check(file, str(elsewhere))] == ["confirmed"]
    with pytest.raises(OtherCheckpoint, match="give the right checkpoint"):
        check(file, str(tiny_model("llama", tmp_path / "other", seed=1)))
    with safe_open(file, framework="pt") as kept:
        metadata = kept.metadata()
        tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
    with safe_open(hashed, framework="pt") as kept:
        assert not list(kept.keys())
        (told,) = json.loads(kept.metadata()["record"])["verdicts"]
    answer = tensors["0.answer"].contiguous().view(torch.uint8).numpy().tobytes()
    assert told["sha256"]["answer"] == hashlib.sha256(answer).hexdigest()
    with pytest.raises(BadRequest, match="only hashes"):
        check(hashed)
    tensors["0.answer"] = tensors["0.answer"] / 1.02
    save_file(tensors, file, metadata)
    assert [one.outcome for one in check(file)] == ["refuted"]
    save_file({"0.answer": tensors["0.answer"]}, file, metadata)
    with pytest.raises(BadRequest, match="lacks its input"):
        check(file)
    file.write_bytes(b"rubbish")
    assert cli.main(["check", str(file)]) == 1


def changed_by(swarm: Swarm, what: str) -> None:
    """What a user does to the model: a hook that edits, or an adapter."""
    if what == "hook":
        swarm.model.model.layers[2].register_forward_hook(lambda *given: 1.1 * given[2])
    elif what == "adapter":
        config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(swarm.model, config)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["hook", "adapter"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_liar_is_found_beside_hooks_and_adapters(
    trio: HostedSwarm, what: str, cached: bool
) -> None:
    with connected(trio, verify=1.0) as swarm:
        changed_by(swarm, what)
        liar = trio.next_of(swarm)
        with liars.lying(liar, liars.weights(lambda weight: 1.02 * weight)):
            swarm.model(ids(), use_cache=cached)
            assert found(swarm).wrong == (liar.peer_id,)


@pytest.mark.parametrize("what", ["", "hook", "adapter"])
def test_honest_servers_agree(trio: HostedSwarm, what: str) -> None:
    with connected(trio, verify=1.0) as swarm:
        changed_by(swarm, what)
        for seed in range(4):
            swarm.model(ids(seed), use_cache=False)
            swarm.model.generate(ids(seed), max_new_tokens=8, do_sample=False)
        table = found(swarm)
        assert {one.outcome for one in table.verdicts} == {"agreed"}
        assert not table.wrong


def test_a_witness_that_lies_is_the_one_that_is_left(trio: HostedSwarm) -> None:
    with connected(trio, verify=1.0) as swarm:
        first = trio.next_of(swarm)
        liar, honest = (server for server in trio.servers if server is not first)
        with liars.lying(liar, liars.LIES["zeros"]):
            # Witnesses are drawn: until it was the liar's turn.
            for seed in range(50):
                swarm.model(ids(seed), use_cache=False)
                if found(swarm).wrong:
                    break
        assert found(swarm).wrong == (liar.peer_id,)
        assert swarm.route().hops[0].peer_id in {first.peer_id, honest.peer_id}


def test_what_a_liar_computed_is_rebuilt_elsewhere(
    trio: HostedSwarm, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with connected(trio, verify=1.0) as swarm:
        prompt = ids(7)
        with liars.lying(trio.next_of(swarm), liars.LIES["a skipped block"]):
            wrong = swarm.model(prompt, use_cache=True)
            assert found(swarm).wrong
        following = torch.tensor([[5, 6]])
        right = swarm.model(following, past_key_values=wrong.past_key_values).logits
        with torch.no_grad():
            expected = local(torch.cat([prompt, following], dim=1)).logits[:, -2:]
        torch.testing.assert_close(right, expected, atol=1e-4, rtol=0)
        assert "from token 1 on it may be wrong" in caplog.text


@pytest.fixture(scope="module")
def halves(tiny_llama: Path) -> Iterator[HostedSwarm]:
    """Three servers of all blocks in bfloat16."""
    with HostedSwarm(tiny_llama, [(0, 5)] * 3, dtype="bfloat16") as swarm, swarm.with_a_node():
        yield swarm


def test_a_small_lie_is_found_by_several_audits_and_two_witnesses(halves: HostedSwarm) -> None:
    with connected(halves, verify=1.0) as swarm:
        liar = halves.next_of(swarm)
        # With what bfloat16 itself makes there about 1.1 times that: one audit wants 1.25.
        with liars.lying(liar, liars.noise(0.0125)):
            for seed in range(300):  # audits and witnesses are drawn
                swarm.model(ids(seed), use_cache=False)
                if found(swarm).wrong:
                    break
        table = found(swarm)
        assert table.wrong == (liar.peer_id,)
        outcomes = [one.outcome for one in table.verdicts]
        assert outcomes[0] == "agreed"  # by itself it could be honest
        doubted, decided = outcomes.index("open"), outcomes.index("wrong")
        assert table.verdicts[doubted].by != table.verdicts[decided].by
        assert "of several audits" in table.verdicts[decided].why
        with pytest.raises(ValueError, match="nothing to prove"):
            table.export("record.safetensors")  # no single answer shows it


def test_honest_halves_agree_however_many_are_added_up(halves: HostedSwarm) -> None:
    with connected(halves, verify=1.0) as swarm:
        verdicts: tuple[Verdict, ...] = ()
        # Each of two witnesses has more than the latest limit is for.
        while sum(one.tokens for one in verdicts) < 3 * limits.MOST_TOKENS:
            swarm.model(ids(len(verdicts)), use_cache=False)
            verdicts = found(swarm).verdicts
        assert {one.outcome for one in verdicts} == {"agreed"}


def test_tokens_of_a_liar_are_marked_where_a_text_is_shown(
    trio: HostedSwarm, lettered: Any
) -> None:
    options = {"tokenizer": lettered.tokenizer, "max_new_tokens": 1}
    with connected(trio, verify=1.0) as swarm:
        shown = GenerateWidget(swarm, "o" * TOKENS, **options)
        with liars.lying(trio.next_of(swarm), liars.LIES["a skipped block"]):
            shown.run()
            assert shown.wait(PATIENCE)
            name = found(swarm).verdicts[0].name
        shown.beat()
        assert shown.touched == [[0, 1]]
        assert shown.suspicion.startswith(f"{name} was found wrong. From its first token on")
        assert "snw-wrong" in shown.picture()
        shown.run()
        assert shown.wait(PATIENCE)
        assert (shown.texts, shown.touched, shown.suspicion) == (2, [], "")
        shown.choose(0)
        assert shown.touched == [[0, 1]]
        shown.close()


def test_an_answer_of_a_liar_is_marked_in_a_conversation(trio: HostedSwarm, lettered: Any) -> None:
    tokenizer = copy.deepcopy(lettered.tokenizer)
    tokenizer.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    with connected(trio, verify=1.0) as swarm:
        chat = ChatWidget(swarm, tokenizer=tokenizer, max_new_tokens=1)
        with liars.lying(trio.next_of(swarm), liars.LIES["a skipped block"]):
            chat.send("o" * TOKENS)
            assert chat.wait(PATIENCE)
            assert found(swarm).wrong
        chat.beat()
        assert ["suspicion" in turn for turn in chat.turns] == [False, True]
        chat.retry()
        assert chat.wait(PATIENCE)
        assert ["suspicion" in turn for turn in chat.turns] == [False, False]
        chat.close()


@pytest.mark.parametrize("here", [False, True])
def test_the_notebook_decides_where_there_is_no_third(tiny_llama: Path, here: bool) -> None:
    with (
        HostedSwarm(tiny_llama, [(0, 5)] * 2) as local,
        connected(local, verify=1.0, verify_here=here) as swarm,
    ):
        liar = local.next_of(swarm)
        with liars.lying(liar, liars.LIES["int8 weights"]):
            swarm.model(ids(), use_cache=False)
            table = found(swarm)
        assert [one.outcome for one in table.verdicts] == ["wrong" if here else "open"]
        assert table.wrong == ((liar.peer_id,) if here else ())


def test_who_was_pushed_its_input_is_blamed_at_once(tiny_llama: Path) -> None:
    """Its print has said that it got what the server before told the notebook."""
    with (
        HostedSwarm(tiny_llama, [(0, 3), (3, 5), (3, 5), (3, 5)]) as local,
        connected(local, verify=1.0) as swarm,
    ):
        liar_id = swarm.route().hops[1].peer_id
        liar = next(server for server in local.servers if server.peer_id == liar_id)
        with liars.lying(liar, liars.LIES["stale"]):
            for seed in range(20):  # three of four are audited, as less travels of them
                swarm.model(ids(seed), use_cache=True)
                if found(swarm).wrong:
                    break
        assert found(swarm).wrong == (liar_id,)


def test_nothing_is_audited_unless_it_is_asked_for(trio: HostedSwarm) -> None:
    with connected(trio) as swarm:
        swarm.model(ids(), use_cache=False)
        assert not found(swarm).verdicts
        assert "nothing is audited" in repr(swarm.audit())
        assert "<table" not in swarm.audit().as_html()
    with pytest.raises(ValueError, match="verify: 'always'"):
        sn.connect(trio.initial_peers, model=trio.model, verify="always")
