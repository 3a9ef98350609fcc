"""A training run goes back to what it was before a server that poisoned gradients was used."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from swarm_notebook.client.audit.verdicts import AGREED, Verdict
from swarm_notebook.swarm import Swarm

logger: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    step: int
    when: float
    weights: dict[str, torch.Tensor]
    optimizer: Any


class Rollback(TrainerCallback):
    """For ``Trainer(callbacks=[…])``: goes back to the last step that is known to be good.

    Audits (``sn.connect(..., verify="spot")``) find a wrong gradient after the fact, when the
    optimizer has used it. Then trained weights and the optimizer's state become those of the last
    snapshot before the last audit of that server's gradients that agreed, or of the beginning. What
    it answered between that audit and the next one was looked at by nobody. The count of steps, the
    schedule and the data go on.

    In a loop of one's own: `begin` before it, `step` after each of the optimizer's.

    Args:
        swarm: whose audits count.
        every: steps between two snapshots.
        keep: snapshots that are kept besides that of the beginning, the latest; each takes the
            memory of the trained weights and of the optimizer's state.

    Attributes:
        rolled_back: for each time, the step at which it was done and the step gone back to.
    """

    def __init__(self, swarm: Swarm, *, every: int = 10, keep: int = 20):
        if every < 1 or keep < 1:
            raise ValueError(f"every: {every}, keep: {keep}; give at least 1 of each")
        self._swarm, self._every, self._keep = swarm, every, keep
        self._snapshots: list[_Snapshot] = []
        self._left: set[str] = set()
        self.rolled_back: list[tuple[int, int]] = []

    def begin(self, model: nn.Module, optimizer: Any, step: int = 0) -> None:
        """Keep what a run begins with."""
        self._left = set(self._swarm.audit().wrong)
        self._snapshots = [_snapshot(step, model, optimizer)]

    def step(self, step: int, model: nn.Module, optimizer: Any) -> int | None:
        """After a step of the optimizer; goes back if a server was found wrong since the last one.

        Returns:
            the step that was gone back to, or None.
        """
        table = self._swarm.audit()
        wrong = set(table.wrong) - self._left
        self._left |= wrong
        if wrong:
            # Also for wrong states: there are no right gradients behind them.
            since = min(_last_good(table.verdicts, peer) for peer in wrong)
            good = [one for one in self._snapshots[1:] if one.when < since]
            chosen = good[-1] if good else self._snapshots[0]
            _restore(chosen, model, optimizer)
            self._snapshots = [one for one in self._snapshots if one.step <= chosen.step]
            self.rolled_back.append((step, chosen.step))
            logger.warning(
                "%d server(s) were found wrong: what they had a part in is undone, training goes "
                "on from the weights of step %d, at step %d",
                len(wrong),
                chosen.step,
                step,
            )
            return chosen.step
        if step % self._every == 0:
            self._snapshots.append(_snapshot(step, model, optimizer))
            del self._snapshots[1 : -self._keep]
        return None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.begin(given["model"], given["optimizer"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.step(state.global_step, given["model"], given["optimizer"])


def _last_good(verdicts: Sequence[Verdict], peer: str) -> float:
    """When a server gave the last gradients that an audit agreed with; 0 for never."""
    found = [one for one in verdicts if one.peer == peer and one.back]
    return max((one.made for one in found if one.outcome == AGREED), default=0.0)


def _snapshot(step: int, model: nn.Module, optimizer: Any) -> _Snapshot:
    weights = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return _Snapshot(step, time.time(), weights, copy.deepcopy(optimizer.state_dict()))


def _restore(snapshot: _Snapshot, model: nn.Module, optimizer: Any) -> None:
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in snapshot.weights.items():
            trained[name].copy_(values)
    rates = [group["lr"] for group in optimizer.param_groups]
    # A copy: a second time may come.
    optimizer.load_state_dict(copy.deepcopy(snapshot.optimizer))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
