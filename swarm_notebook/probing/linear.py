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
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from swarm_notebook.model.home import Blocks, which
from swarm_notebook.probing.grid import Cell, Legend, as_html
from swarm_notebook.probing.states import hidden_states
from swarm_notebook.probing.subject import Subject, Target
from swarm_notebook.probing.view import HiddenStates
from swarm_notebook.progress import Waiting
from swarm_notebook.report.formatting import count, data_frame, text_table
from swarm_notebook.report.plot import Line, LineChart
from swarm_notebook.tuning.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    import pandas as pd

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
        confusion: how often each label (row) was given each label (column) by probes that had not
            seen the text, ``[classes, classes]`` whole numbers.
    """

    block: int
    labels: list[Label]
    weight: torch.Tensor
    bias: torch.Tensor
    accuracy: float
    spread: float
    confusion: torch.Tensor

    def predict(self, states: torch.Tensor) -> list[Label]:
        """The label of each state ``[count, hidden]``."""
        scores = states.float() @ self.weight.T + self.bias
        return [self.labels[best] for best in scores.argmax(-1).tolist()]


@dataclass(frozen=True)
class Confusion:
    """How often each label was given each label.

    Attributes:
        block: whose probe.
        labels: the classes.
        counts: ``[classes, classes]``; a row is what a text is, a column what it was taken for.
    """

    block: int
    labels: list[Label]
    counts: torch.Tensor

    def to_pandas(self) -> pd.DataFrame:
        """The counts, rows and columns named by the labels."""
        import pandas as pd

        return pd.DataFrame(self.counts.tolist(), index=self.labels, columns=self.labels)

    def __repr__(self) -> str:
        names = [str(label) for label in self.labels]
        rows = [
            [name, *map(str, row)] for name, row in zip(names, self.counts.tolist(), strict=True)
        ]
        return "\n".join([self._title, *text_table(["true \\ predicted", *names], rows)])

    def _repr_html_(self) -> str:
        shares = self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)
        rows = [
            (
                label,
                [
                    Cell(str(count), share, f"{100 * share:.0f}% of {label}")
                    for count, share in zip(counts, row, strict=True)
                ],
            )
            for label, counts, row in zip(
                self.labels, self.counts.tolist(), shares.tolist(), strict=True
            )
        ]
        return as_html(
            self._title,
            [str(label) for label in self.labels],
            rows,
            corner="true \\ predicted",
            legend=Legend("0%", "100% of the row"),
        )

    @property
    def _title(self) -> str:
        return f"Confusion matrix, block {self.block} (cross-validated)"


class Probes(Mapping[int, LinearProbe]):
    """One probe per block.

    Attributes:
        chance: the accuracy of always saying the most frequent label: the majority baseline.
        count: how many texts they were fitted on.
        manifest: the record of the run that made the states, if a swarm did.
        states: what they were fitted on, if that was collected from texts in this kernel.
    """

    chance: float
    count: int
    manifest: dict[str, Any] | None

    def __init__(
        self,
        probes: Iterable[LinearProbe],
        chance: float,
        count: int,
        manifest: dict[str, Any] | None,
        states: HiddenStates | None = None,
    ):
        self._probes = {probe.block: probe for probe in probes}
        self.chance, self.count, self.manifest = chance, count, manifest
        self.states = states

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
        return "\n".join([self._title, *text_table(["block", "accuracy", "±"], rows)])

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()

    def plot(self) -> LineChart:
        """Accuracy by block with its spread over the folds, and the majority baseline."""
        probes = sorted(self.values(), key=lambda probe: probe.block)
        line = Line(
            "accuracy",
            [probe.block for probe in probes],
            [probe.accuracy for probe in probes],
            [probe.spread for probe in probes],
        )
        baseline = (f"majority baseline {self.chance:.2f}", self.chance)
        title = f"Probe accuracy by block, {count(self.count, 'text')}"
        return LineChart(title, "block", [line], [baseline], within=(0.0, 1.0))

    def to_pandas(self) -> pd.DataFrame:
        """One row per block: accuracy, its spread, and how far it is above the baseline."""
        rows = [
            (probe.block, probe.accuracy, probe.spread, probe.accuracy - self.chance)
            for probe in self.values()
        ]
        return data_frame(rows, ["block", "accuracy", "spread", "above_baseline"])

    def predict(
        self, texts: Sequence[str], *, block: int | None = None, target: Target | None = None
    ) -> list[Label]:
        """The label of each text.

        Args:
            texts: any number of them; their states are collected as those of the fit were.
            block: whose probe; None is the best one's.
            target: a swarm or a model; None takes the one that the states came from.

        Raises:
            ValueError: how the states were pooled is not known, or no model is: the probes were
                read from disk, or fitted on matrices.
        """
        probe = self.best if block is None else self[block]
        known = self.states
        if known is None:
            raise ValueError(
                "these probes do not know how their states were collected; collect them with "
                "hidden_states and use probes[block].predict(states[block])"
            )
        subject = Subject.of(target) if target is not None else known.subject
        if subject is None:
            raise ValueError("target: these states were read from a store; give the swarm or model")
        collected = hidden_states(
            subject.swarm or subject.model,
            texts,
            blocks=probe.block,
            pool=known.key.pool,  # type: ignore[arg-type]
            max_length=known.key.max_length,
            tag=known.key.tag,
            tokenizer=subject.tokenizer,
        )
        return probe.predict(collected[probe.block])

    def confusion(self, block: int | None = None) -> Confusion:
        """What was taken for what, by probes that had not seen the text; None is the best block."""
        probe = self.best if block is None else self[block]
        return Confusion(probe.block, probe.labels, probe.confusion)

    @property
    def _title(self) -> str:
        texts = count(self.count, "text")
        return f"linear probes on {texts}; majority baseline {self.chance:.2f}"

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
                block: {
                    "labels": p.labels,
                    "accuracy": p.accuracy,
                    "spread": p.spread,
                    "confusion": p.confusion.tolist(),
                }
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
            torch.tensor(known["confusion"]),
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
    blocks: Blocks | None = None,
    folds: int = 5,
    strength: float = 1.0,
    seed: int = 0,
) -> Probes:
    """Fit one classifier per block and judge it on texts that it has not seen.

    Args:
        states: pooled states, or a matrix ``[texts, hidden]`` per block.
        labels: one per text, in the same order.
        blocks: a block, a list, a range or a slice of those collected; None is all.
        folds: of the cross-validation; each keeps the shares of the labels.
        strength: scikit-learn's ``C``; less means simpler probes.
        seed: of the folds.

    Raises:
        ValueError: the number of labels differs from the number of texts, or a label is too rare.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    known = states.blocks if isinstance(states, HiddenStates) else list(states)
    texts = len(states) if isinstance(states, HiddenStates) else len(states[known[0]])
    if len(labels) != texts:
        raise ValueError(f"labels: got {count(len(labels), 'label')} for {count(texts, 'text')}")
    names = sorted(set(labels))
    numbers = torch.tensor([names.index(label) for label in labels], dtype=torch.long)
    counts = numbers.bincount(minlength=len(names)).tolist()
    rarest = min(counts, default=0)
    if len(names) < 2 or rarest < folds:
        raise ValueError(
            f"labels: {len(names)} classes, the rarest with {rarest} texts; at least 2 classes "
            f"with {folds} texts each are needed (folds={folds})"
        )
    chosen = known if blocks is None else which(blocks, max(known) + 1)
    how = _sklearn(folds, strength, seed)
    probes: list[LinearProbe] = []
    with Waiting("Fitting probes", total=len(chosen), unit="blocks", count=lambda: len(probes)):
        probes.extend(_fitted(block, states[block], numbers, names, how) for block in chosen)
    chance = max(counts) / len(labels)
    source = states if isinstance(states, HiddenStates) else None
    return Probes(probes, chance, texts, source.manifest if source else None, source)


def _fitted(
    block: int, states: torch.Tensor, numbers: torch.Tensor, names: list[Label], how: Any
) -> LinearProbe:
    """A probe of one block."""
    model, split = how
    values, classes = states.float().cpu().numpy(), len(names)
    guesses, right = torch.empty_like(numbers), []
    for seen, unseen in split.split(values, numbers):
        model.fit(values[seen], numbers[seen])
        guesses[unseen] = torch.from_numpy(model.predict(values[unseen]))
        right.append((guesses[unseen] == numbers[unseen]).double().mean())
    scores = torch.stack(right)
    confusion = torch.bincount(numbers * classes + guesses, minlength=classes**2)
    scaler, classifier = (step for _, step in model.fit(values, numbers).steps)
    weight = torch.from_numpy(classifier.coef_ / scaler.scale_)
    bias = torch.from_numpy(classifier.intercept_) - weight @ torch.from_numpy(scaler.mean_)
    if classes == 2:
        # scikit-learn keeps one plane for two classes: these are its two sides.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return LinearProbe(
        block,
        names,
        weight.float(),
        bias.float(),
        float(scores.mean()),
        float(scores.std(correction=0)),
        confusion.reshape(classes, classes),
    )


def _sklearn(folds: int, strength: float, seed: int) -> tuple[Any, Any]:
    """The model to fit, and how texts are held back to judge it."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "linear_probe needs scikit-learn: pip install 'swarm-notebook[probing]'",
            name="sklearn",
        ) from error
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    return model, StratifiedKFold(folds, shuffle=True, random_state=seed)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
