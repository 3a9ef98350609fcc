"""Lets nnsight's own tests of GPT-2 run on a remote model (a plugin of pytest).

They ask the Hub for GPT-2; a cache is laid in its place that has a tiny random one, with as many
blocks. Run first with ``--on-local``, which holds that model locally and writes which tests fail
(many want the real one's words); then with ``--on-remote``, on the same model served inside of this
process.
A test that passes locally and fails on the remote model is unexpected, unless its error is one of
`refused.txt`.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from foreign.refusals import reason_for
from support.hosting import HostedSwarm
from support.letter_tokenizer import add_tokenizer
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn

NAMES = ("gpt2", "openai-community/gpt2")
BLOCKS = 12  # the tests reach for the last one by its number
REVISION = "0" * 40

_running = ExitStack()
_totals: Counter[str] = Counter()
_reasons: Counter[str] = Counter()
_failed: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-local", action="store_true", help="hold the model locally")
    parser.addoption("--on-remote", action="store_false", dest="on_local", help="the default")
    parser.addoption("--known", type=Path, required=True, help="where the results are kept")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    folder = add_tokenizer(tiny_model("gpt2", mkdtemp(), num_hidden_layers=BLOCKS))
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    for name in NAMES:
        kept = cache / f"models--{name.replace('/', '--')}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept / "snapshots" / REVISION)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text(REVISION)
    if config.getoption("on_local"):
        return
    swarm = _running.enter_context(HostedSwarm(folder, 2))
    remote = _running.enter_context(sn.connect(swarm.initial_peers, model=folder)).model
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name) not in NAMES:
            return load(name, *args, **kwargs)
        model = copy.deepcopy(remote)
        model.name_or_path = model.config._name_or_path = str(name)
        # As where the tests come from: a local model's weights all want gradients.
        model.get_input_embeddings().requires_grad_(True)
        return model

    AutoModelForCausalLM.from_pretrained = from_pretrained  # type: ignore[method-assign]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" and not report.failed:
        return
    local = item.config.getoption("on_local")
    known = item.config.getoption("known")
    if report.failed and not local:
        said = f"{item.name} {call.excinfo.exconly()}"
        reason = reason_for(said)
        if item.nodeid in json.loads(known.read_text()):
            reason = "fails on the tiny local model, too"
        if reason is not None:
            report.outcome, report.wasxfail = "skipped", reason
            _reasons[reason] += 1
            _totals["refused as listed, or failed locally"] += 1
            return
    if report.failed:
        _failed.append(item.nodeid)
    _totals["unexpected" if report.failed else report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("on_local"):
        session.config.getoption("known").write_text(json.dumps(_failed))
        session.exitstatus = 0


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason, count in _reasons.most_common():
        terminalreporter.write_line(f"{count:6} {reason}")
    totals = ", ".join(f"{count} {name}" for name, count in _totals.most_common())
    terminalreporter.write_line(f"nnsight's tests: {totals}")


def pytest_unconfigure(config: pytest.Config) -> None:
    _running.close()
