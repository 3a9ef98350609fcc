"""Linear probes: what can be read off each block by a plane through its states.

One logistic regression per block, judged by cross-validation, beside the share of the most
frequent label, which is what a probe must beat. scikit-learn fits on standardised states; the
standardisation is then folded into the weights, so a probe is only ``states @ weight.T + bias``:
it can be saved as safetensors, and its rows are directions in the model's own space, fit to steer
along.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from swarm_notebook.probing.grid import Cell, as_html
from swarm_notebook.probing.view import HiddenStates
from swarm_notebook.report.formatting import text_table
from swarm_notebook.tuning.manifest import MANIFEST_FILE

WEIGHTS_FILE = "probes.safetensors"
REPORT_FILE = "probes.json"

Label = str | int | bool


@dataclass(frozen=True)
class LinearProbe:
    """A classifier on the states of one block.

    Attributes:
        labels: the classes.
        weight: ``[classes, hidden]``, one direction per class.
        bias: ``[classes]``.
        accuracy: mean over the folds of the cross-validation.
        spread: standard deviation over the folds.
    """

    block: int
    labels: list[Label]
    weight: torch.Tensor
    bias: torch.Tensor
    accuracy: float
    spread: float

    def predict(self, states: torch.Tensor) -> list[Label]:
        """The label of each state ``[count, hidden]``."""
        scores = states.float() @ self.weight.T + self.bias
        return [self.labels[best] for best in scores.argmax(-1).tolist()]


class Probes(Mapping[int, LinearProbe]):
    """One probe per block.

    Attributes:
        chance: the accuracy of always saying the most frequent label.
        count: how many texts they were fitted on.
        manifest: the record of the run that made the states, if a swarm did.
    """

    def __init__(
        self,
        probes: Iterable[LinearProbe],
        chance: float,
        count: int,
        manifest: dict[str, Any] | None,
    ):
        self._probes = {probe.block: probe for probe in probes}
        self.chance, self.count, self.manifest = chance, count, manifest

    def __getitem__(self, block: int) -> LinearProbe:
        return self._probes[block]

    def __iter__(self) -> Any:
        return iter(self._probes)

    def __len__(self) -> int:
        return len(self._probes)

    @property
    def best(self) -> LinearProbe:
        """The probe with the highest accuracy; of equal ones the earliest block's."""
        return max(self.values(), key=lambda probe: (probe.accuracy, -probe.block))

    def __repr__(self) -> str:
        rows = [
            [str(probe.block), f"{probe.accuracy:.2f}", f"{probe.spread:.2f}"]
            for probe in self.values()
        ]
        return "\n".join([self._title, *text_table(["block", "accuracy", "+-"], rows)])

    def _repr_html_(self) -> str:
        span = max(1 - self.chance, 1e-9)
        rows = {
            probe.block: [
                Cell(f"{probe.accuracy:.3f}", (probe.accuracy - self.chance) / span),
                Cell(f"±{probe.spread:.3f}", 0),
            ]
            for probe in self.values()
        }
        return as_html(self._title, ["accuracy", ""], rows)

    @property
    def _title(self) -> str:
        return f"linear probes on {self.count} texts; the most frequent label has {self.chance:.2f}"

    def save(self, folder: str | Path) -> Path:
        """Write the probes, their accuracies and the run's manifest into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{block}.{name}": getattr(probe, name).contiguous()
            for block, probe in self.items()
            for name in ("weight", "bias")
        }
        save_file(tensors, folder / WEIGHTS_FILE)
        report = {
            "chance": self.chance,
            "count": self.count,
            "blocks": {
                block: {"labels": p.labels, "accuracy": p.accuracy, "spread": p.spread}
                for block, p in self.items()
            },
        }
        _write_json(folder / REPORT_FILE, report)
        if self.manifest is not None:
            _write_json(folder / MANIFEST_FILE, self.manifest)
        return folder


def load_probes(folder: str | Path) -> Probes:
    """Read what `Probes.save` wrote; needs no scikit-learn."""
    folder = Path(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    probes = [
        LinearProbe(
            int(block),
            known["labels"],
            tensors[f"{block}.weight"],
            tensors[f"{block}.bias"],
            known["accuracy"],
            known["spread"],
        )
        for block, known in report["blocks"].items()
    ]
    manifest = folder / MANIFEST_FILE
    record = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else None
    return Probes(probes, report["chance"], report["count"], record)


def linear_probe(
    states: HiddenStates | Mapping[int, torch.Tensor],
    labels: Sequence[Label],
    *,
    blocks: Iterable[int] | None = None,
    folds: int = 5,
    strength: float = 1.0,
    seed: int = 0,
) -> Probes:
    """Fit one classifier per block and judge it on texts that it has not seen.

    Args:
        states: pooled states, or a matrix ``[texts, hidden]`` per block.
        labels: one per text, in the same order.
        blocks: None is all.
        folds: of the cross-validation; each keeps the shares of the labels.
        strength: scikit-learn's ``C``; less means simpler probes.
        seed: of the folds.

    Raises:
        ValueError: the number of labels differs from the number of texts, or a label is too rare.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    names = sorted(set(labels))
    numbers = [names.index(label) for label in labels]
    rarest = min((numbers.count(number) for number in range(len(names))), default=0)
    if len(names) < 2 or rarest < folds:
        raise ValueError(
            f"labels: {len(names)} classes, the rarest with {rarest} texts; at least 2 classes "
            f"with {folds} texts each are needed (folds={folds})"
        )
    known = states.blocks if isinstance(states, HiddenStates) else list(states)
    fit = _Fit(numbers, names, folds, strength, seed)
    probes = [fit.probe(block, states[block]) for block in (known if blocks is None else blocks)]
    chance = max(numbers.count(number) for number in range(len(names))) / len(numbers)
    manifest = states.manifest if isinstance(states, HiddenStates) else None
    return Probes(probes, chance, len(numbers), manifest)


@dataclass(frozen=True)
class _Fit:
    """How the probes of all blocks are fitted."""

    numbers: list[int]
    names: list[Label]
    folds: int
    strength: float
    seed: int

    def probe(self, block: int, states: torch.Tensor) -> LinearProbe:
        linear, pipeline, preprocessing, selection = _sklearn()
        if len(states) != len(self.numbers):
            raise ValueError(f"labels: {len(self.numbers)} of them for {len(states)} texts")
        values = states.float().cpu().numpy()
        scaler = preprocessing.StandardScaler()
        classifier = linear.LogisticRegression(C=self.strength, max_iter=2000)
        model = pipeline.make_pipeline(scaler, classifier)
        split = selection.StratifiedKFold(self.folds, shuffle=True, random_state=self.seed)
        scores = selection.cross_val_score(model, values, self.numbers, cv=split)
        model.fit(values, self.numbers)
        weight = torch.from_numpy(classifier.coef_ / scaler.scale_)
        bias = torch.from_numpy(classifier.intercept_) - weight @ torch.from_numpy(scaler.mean_)
        if len(self.names) == 2:
            # scikit-learn keeps one plane for two classes: these are its two sides.
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return LinearProbe(
            block,
            self.names,
            weight.float(),
            bias.float(),
            float(scores.mean()),
            float(scores.std()),
        )


def _sklearn() -> tuple[Any, Any, Any, Any]:
    try:
        from sklearn import linear_model, model_selection, pipeline, preprocessing
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "linear_probe needs scikit-learn: pip install 'swarm-notebook[probing]'",
            name="sklearn",
        ) from error
    return linear_model, pipeline, preprocessing, model_selection


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
