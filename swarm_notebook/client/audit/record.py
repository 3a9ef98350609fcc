"""Records of answers that were found wrong, as files: whoever has the weights can replay them.

A record is a safetensors file: per verdict what the server was asked and what it answered, and in
its metadata, as JSON, which checkpoint, server and blocks, what was found and with which versions.
It holds hidden states, from which the text can be read (see `Swarm.privacy`), or in their place a
SHA-256 of each tensor, by which whoever has them can be held to them.

A record is somebody's word: nothing in it is signed by the server. What `check` confirms is that
the answer in it is not what the blocks give for the input in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from swarm_notebook.client.audit import piece
from swarm_notebook.client.audit.verdicts import Verdict
from swarm_notebook.client.passes.backward import PassGradients
from swarm_notebook.client.request import Request
from swarm_notebook.errors import BadRequest

_FORMAT = "swarm-notebook audit 1"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the JSON: 64 verdicts take a hundredth of it.
_MAX_TEXT = 1 << 20


@dataclass(frozen=True)
class Recorded:
    """One wrong answer as it was recorded.

    Attributes:
        model, digest: the checkpoint's name and digest (`checkpoint.files.digest`).
        peer, name: the server.
        why: what was found.
        dtype: what the server said it computes in.
        rounded: what the answer's values were rounded to on their way.
        adapter: it was run with an adapter of the notebook, which is not recorded.
        packed: its weights were packed, so that they have other values than the checkpoint's.
        request: what it was asked.
        answer, counted: as in `Piece`.
        grad, gradients: as in `Piece`.
    """

    model: str
    digest: str
    peer: str
    name: str
    why: str
    dtype: torch.dtype
    rounded: torch.dtype
    adapter: bool
    packed: bool
    request: Request
    answer: torch.Tensor
    counted: torch.Tensor
    grad: torch.Tensor | None
    gradients: PassGradients | None


def write(
    path: Path, model: str, digest: str, verdicts: Sequence[Verdict], *, states: bool = True
) -> None:
    """Write the verdicts that have a proof.

    Args:
        states: with what was asked and answered; else with hashes of it.
    """
    tensors: dict[str, torch.Tensor] = {}
    told = []
    proven = [(one, one.proof) for one in verdicts if one.proof is not None]
    for number, (verdict, found) in enumerate(proven):
        request = found.request
        parts = {
            "hidden": request.hidden,
            "answer": found.answer,
            "counted": found.counted,
            "mask": request.mask,
            "position_ids": request.position_ids,
            "prompts": request.prompts,
            "grad": found.grad,
        }
        for block, one in (found.gradients.prompts if found.gradients else {}).items():
            parts[f"prompt_gradient.{block}"] = one
        own = {
            name: one.detach().contiguous().clone()
            for name, one in parts.items()
            if one is not None
        }
        if states:
            tensors |= {f"{number}.{name}": one for name, one in own.items()}
        dtype = piece.dtype_of(found.segment)
        told.append(
            {
                "peer": verdict.peer,
                "name": verdict.name,
                "blocks": [verdict.start, verdict.end],
                "when": verdict.made,
                "by": list(verdict.by),
                "why": verdict.why,
                "error": None if verdict.errors is None else verdict.errors.mean,
                "sha256": {name: _hash(one) for name, one in own.items()},
                "dtype": str(dtype or torch.float32).removeprefix("torch."),
                "rounded": str(found.rounded).removeprefix("torch."),
                "adapter": request.adapter is not None,
                "packed": not piece.of_checkpoint(found.segment),
                "server": found.segment.span.info.version,
            }
        )
    versions = {
        name: importlib.metadata.version(name)
        for name in ("swarm-notebook", "torch", "transformers")
    }
    text = json.dumps({"model": model, "digest": digest, "versions": versions, "verdicts": told})
    save_file(tensors, path, {"format": _FORMAT, "record": text})


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


def read(path: Path) -> list[Recorded]:
    """What a record says, checked field by field: it may be anybody's.

    Raises:
        BadRequest: the file is no record, or has hashes in the place of states.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("record", "")
            if metadata.get("format") != _FORMAT or len(text) > _MAX_TEXT:
                raise BadRequest(f"{path} is not a record of audits")
            told = json.loads(text)
            names = set(file.keys())
            if told["verdicts"] and not names:
                raise BadRequest(
                    f"{path} has only hashes of what was asked and answered, which nobody can "
                    "replay: ask for a record with states"
                )
            return [
                _recorded(told, number, one, names, file.get_tensor)
                for number, one in enumerate(told["verdicts"])
            ]
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"{path} is not a record of audits: {error}") from None


def _recorded(told: Any, number: int, one: Any, names: set[str], get: Any) -> Recorded:
    def tensor(name: str) -> torch.Tensor | None:
        full = f"{number}.{name}"
        return get(full) if full in names else None

    start, end = one["blocks"]
    hidden, answer, counted = tensor("hidden"), tensor("answer"), tensor("counted")
    prompts, grad = tensor("prompts"), tensor("grad")
    if type(start) is not int or type(end) is not int or not 0 <= start < end:
        raise ValueError(f"blocks {start}:{end}")
    if hidden is None or answer is None or counted is None or hidden.dim() != 3:
        raise ValueError(f"verdict {number} lacks its input or its answer")
    same = answer.shape == hidden.shape and counted.shape == hidden.shape[:2]
    if not same or (grad is not None and grad.shape != hidden.shape):
        raise ValueError(f"verdict {number} has an input and an answer of different shapes")
    if prompts is not None and (prompts.dim() != 4 or len(prompts) != end - start):
        raise ValueError(f"verdict {number} has prompts of shape {list(prompts.shape)}")
    request = Request(
        start,
        end,
        hidden.float(),
        0,
        mask=tensor("mask"),
        position_ids=tensor("position_ids"),
        prompts=prompts,
    )
    gradients = None
    if grad is not None:
        found = {block: tensor(f"prompt_gradient.{block}") for block in range(start, end)}
        kept = {block: one for block, one in found.items() if one is not None}
        gradients = PassGradients(answer, prompts=kept)
    return Recorded(
        str(told["model"]),
        str(told["digest"]),
        str(one["peer"]),
        str(one["name"]),
        str(one["why"]),
        _DTYPES[one["dtype"]],
        _DTYPES[one["rounded"]],
        bool(one["adapter"]),
        bool(one["packed"]),
        request,
        answer,
        counted.bool(),
        grad,
        gradients,
    )
