"""Replays a record of wrong answers with the weights of a checkpoint: ``swarm-notebook check``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from swarm_notebook.checkpoint.files.digest import digest, matches
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.client.audit import limits, record
from swarm_notebook.client.audit.comparison import Result, errors_of
from swarm_notebook.client.audit.record import Recorded
from swarm_notebook.errors import OtherCheckpoint, Unsupported
from swarm_notebook.model.judge import HomeJudge

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"


@dataclass(frozen=True)
class Finding:
    """What became of one recorded verdict.

    Attributes:
        outcome: `CONFIRMED` (the answer is wrong), `REFUTED` (it is what the blocks give) or
            `UNDECIDED`: it cannot be replayed.
        why: what is wrong, or why it is undecided.
    """

    recorded: Recorded
    outcome: str
    why: str = ""

    def __str__(self) -> str:
        one = self.recorded
        blocks = f"blocks {one.request.start}:{one.request.end}"
        why = f": {self.why}" if self.why else ""
        return f"server {one.name} ({one.peer}), {blocks}: {self.outcome}{why}"


def check(path: str | os.PathLike[str], model: str | None = None) -> list[Finding]:
    """Replay a record.

    Args:
        path: a file that `AuditTable.export` has written.
        model: a Hub id, a folder or a GGUF file; None is the one that the record names.

    Raises:
        BadRequest: the file is no record.
        ModelNotFound: the checkpoint is not there.
        OtherCheckpoint: it is not the one that the record is about.
    """
    findings = []
    for one in record.read(Path(path)):
        source = resolve(model or one.model)
        own = digest(source)
        if not matches(own, one.digest):
            raise OtherCheckpoint(
                f"{source.name} has the digest {own}, the record is about {one.digest}: give the "
                "right checkpoint with --model"
            )
        findings.append(_replayed(one, HomeJudge(source)))
    return findings


def _replayed(one: Recorded, judge: HomeJudge) -> Finding:
    if one.adapter:
        return Finding(one, UNDECIDED, "it was run with an adapter, which no record holds")
    if one.packed:
        said = "its weights were packed, and no checkpoint has their values: only a server can tell"
        return Finding(one, UNDECIDED, said)
    try:
        reference = judge(one.request, torch.float32, one.grad)
        twin = None if one.dtype == torch.float32 else judge(one.request, one.dtype, one.grad)
    except Unsupported as error:
        return Finding(one, UNDECIDED, str(error))
    answer: Result = one.gradients or one.answer
    states, weights = errors_of(answer, reference, twin, one.counted)
    _, why = limits.judged(states, weights, one.rounded, back=one.grad is not None)
    return Finding(one, CONFIRMED if why else REFUTED, why)
