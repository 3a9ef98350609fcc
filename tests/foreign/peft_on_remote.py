"""Lets PEFT's own tests of decoder models run on remote models (a plugin of pytest).

Whatever `AutoModelForCausalLM` would load from the Hub becomes a remote model of the same family:
tiny, random, and served inside of this process. A test that ends in an error that `refused.txt`
lists counts as refused; any other failure is unexpected.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from foreign.refusals import reason_for
from support.hosting import HostedSwarm
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn

# What PEFT's names of models say, and the family that stands for it.
FAMILIES = {
    "optfor": "opt",
    "gpt2": "gpt2",
    "llamafor": "llama",
    "gemma3for": "gemma3_text",
    "mistralfor": "mistral",
}

# PEFT's tests import it for models of pictures alone, which these are not.
_pictures: Any = types.ModuleType("diffusers")
_pictures.__spec__ = ModuleSpec("diffusers", None)
_pictures.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules.setdefault("diffusers", _pictures)

_running = ExitStack()
_totals: Counter[str] = Counter()
_reasons: Counter[str] = Counter()


@functools.cache
def _folder(family: str) -> Path:
    return tiny_model(family, mkdtemp())


@functools.cache
def _remote(family: str) -> Any:
    swarm = _running.enter_context(HostedSwarm(_folder(family), 2))
    return _running.enter_context(sn.connect(swarm.initial_peers, model=_folder(family))).model


def _family(name: str) -> str | None:
    return next((family for part, family in FAMILIES.items() if part in name.lower()), None)


_load = AutoModelForCausalLM.from_pretrained


def _from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
    family = None if Path(name).is_dir() else _family(str(name))
    if family is None:
        return _load(name, *args, **kwargs)
    model = copy.deepcopy(_remote(family))
    model.name_or_path = model.config._name_or_path = str(name)
    dtype = kwargs.get("dtype")
    return model if dtype is None else model.to(dtype)


def pytest_configure(config: pytest.Config) -> None:
    AutoModelForCausalLM.from_pretrained = _from_pretrained  # type: ignore[method-assign]
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only what has a family that is served here."""
    kept = [item for item in items if _family(item.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" and not report.failed:
        return
    if report.failed:
        said = f"{item.name} {call.excinfo.exconly()}"
        reason = reason_for(said)
        if reason is not None:
            report.outcome, report.wasxfail = "skipped", reason
            _totals["refused as listed"] += 1
            _reasons[reason] += 1
            return
    _totals["unexpected" if report.failed else report.outcome] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason, count in _reasons.most_common():
        terminalreporter.write_line(f"{count:6} {reason}")
    names = ("passed", "skipped", "refused as listed", "unexpected")
    totals = ", ".join(f"{_totals[name]} {name}" for name in names)
    terminalreporter.write_line(f"PEFT's tests on remote models: {totals}")


def pytest_unconfigure(config: pytest.Config) -> None:
    _running.close()
