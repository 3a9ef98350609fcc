"""Hidden states in shards, in memory or on disk.

A store is a folder. For each *key* (model, revision, precision of the blocks, pooling, …) it has
a folder of shards and a small ``index.json``:

    states/SmolLM2-135M-Instruct-1f0c2d3e/
        index.json                  the key, and which shards are finished
        sample.safetensors          what the model makes of some fixed tokens (see `identity`)
        swarm_run.json              how the latest shards were made
        shard-00000.safetensors     "block.7": [rows, hidden], "lengths": rows per text, "texts"

A model that makes something else of these tokens gets another folder, `…-1f0c2d3e-1`.

Within a key, states are found by block and by the hash of their text; neither the order of the
texts nor how they were split into shards matters. A shard is finished when the index lists it:
both are written beside and moved into place, so that a process killed at any moment leaves whole
files. Reading maps the files into memory; nothing is loaded before it is used.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from swarm_notebook.probing.identity import alike
from swarm_notebook.report.formatting import model_title
from swarm_notebook.tuning.manifest import MANIFEST_FILE

logger: logging.Logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
SAMPLE_FILE = "sample.safetensors"
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Key:
    """What the states of a folder have in common; see `hidden_states` for the fields."""

    model: str
    revision: str | None
    precision: str
    dtype: str
    pool: str | None
    max_length: int | None
    tag: str

    @property
    def folder(self) -> str:
        readable = re.sub(r"[^\w.-]+", "-", model_title(self.model)).strip("-.")[:60]
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Shard:
    """The states of some texts at some blocks.

    Attributes:
        texts: the texts' digests.
        lengths: how many rows each text has.
        load: gives a block's states ``[rows, hidden]``.
    """

    texts: list[bytes]
    lengths: list[int]
    blocks: frozenset[int]
    load: Callable[[int], torch.Tensor]


def digest(text: str | Sequence[int] | torch.Tensor) -> bytes:
    """The name of a text, or of token ids."""
    if isinstance(text, str):
        raw = text.encode()
    else:
        raw = b"ids:" + ",".join(str(int(token)) for token in text).encode()
    return hashlib.sha256(raw).digest()[:DIGEST_BYTES]


class Shards:
    """Shards in memory."""

    def __init__(self, key: Key):
        self.key = key
        self.manifest: dict[str, Any] | None = None
        # Where a text is: (shard, first row, rows), several times if its blocks came in parts.
        self._places: dict[bytes, list[tuple[Shard, int, int]]] = {}

    def add(
        self, texts: list[bytes], lengths: list[int], states: Mapping[int, torch.Tensor]
    ) -> None:
        self._note(Shard(texts, lengths, frozenset(states), states.__getitem__))

    def place(self, text: bytes, block: int) -> tuple[Shard, int, int] | None:
        """Where the state of a text at a block is, if it is here."""
        for place in self._places.get(text, ()):
            if block in place[0].blocks:
                return place
        return None

    @property
    def texts(self) -> list[bytes]:
        return list(self._places)

    @property
    def blocks(self) -> list[int]:
        found = {
            block
            for places in self._places.values()
            for place in places
            for block in place[0].blocks
        }
        return sorted(found)

    def describe(self, manifest: dict[str, Any]) -> None:
        """Keep the record of the run that makes the states."""
        self.manifest = manifest

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around all calls of `add`."""
        yield

    def _note(self, shard: Shard) -> None:
        first = 0
        for text, length in zip(shard.texts, shard.lengths, strict=True):
            self._places.setdefault(text, []).append((shard, first, length))
            first += length


class ShardFolder(Shards):
    """Shards on disk; those that are there already are known from the beginning.

    Args:
        path: the folder of shards.
        sample: what the model makes of some fixed tokens; None for a reader.
    """

    def __init__(self, path: Path, key: Key, sample: torch.Tensor | None = None):
        super().__init__(key)
        self._path, self._sample = path, sample
        self._entries: list[dict[str, Any]] = []
        if (self._path / INDEX_FILE).exists():
            self._read()

    def add(
        self, texts: list[bytes], lengths: list[int], states: Mapping[int, torch.Tensor]
    ) -> None:
        tensors = {f"block.{block}": state.contiguous() for block, state in states.items()}
        tensors["lengths"] = torch.tensor(lengths)
        tensors["texts"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).view(
            len(texts), DIGEST_BYTES
        )
        listed = {entry["file"] for entry in self._entries}
        names = (f"shard-{number:05d}.safetensors" for number in itertools.count())
        # A file that is there without being listed was never finished.
        name = next(name for name in names if name not in listed)
        _write(self._path / name, lambda path: save_file(tensors, path))
        entry = {"file": name, "texts": len(texts), "rows": sum(lengths), "blocks": sorted(states)}
        self._entries.append(entry)
        index = {"key": dataclasses.asdict(self.key), "shards": self._entries}
        _write_json(self._path / INDEX_FILE, index)
        self._note(_open_shard(self._path / name))

    def describe(self, manifest: dict[str, Any]) -> None:
        super().describe(manifest)
        _write_json(self._path / MANIFEST_FILE, manifest)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Refuse a second writer; the lock goes with its process.

        Raises:
            BlockingIOError: another process writes here.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        file = self._path / SAMPLE_FILE
        if self._sample is not None and not file.exists():
            made = {"sample": self._sample}
            _write(file, lambda path: save_file(made, path))
        with (self._path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"store: another process is writing to {self._path}; wait for it, or stop it"
                ) from None
            yield

    def _read(self) -> None:
        index = json.loads((self._path / INDEX_FILE).read_text(encoding="utf-8"))
        for entry in index["shards"]:
            try:
                shard = _open_shard(self._path / entry["file"])
            except (OSError, SafetensorError) as error:
                logger.warning("%s: %s; its texts will be computed again", entry["file"], error)
                continue
            self._entries.append(entry)
            self._note(shard)
        manifest = self._path / MANIFEST_FILE
        if manifest.exists():
            self.manifest = json.loads(manifest.read_text(encoding="utf-8"))


def folder_for(store: str | os.PathLike[str], key: Key, sample: torch.Tensor) -> ShardFolder:
    """The shards of a key that were made by a model with this sample; empty if there are none."""
    exact = key.precision in ("float32", "float64")
    for number in itertools.count():
        path = Path(store) / (f"{key.folder}-{number}" if number else key.folder)
        try:
            found = load_file(path / SAMPLE_FILE)["sample"]
        except FileNotFoundError:
            if (path / INDEX_FILE).exists():
                continue  # nobody knows which model these are of
            return ShardFolder(path, key, sample)
        if alike(found, sample, exact=exact):
            return ShardFolder(path, key)
    raise AssertionError("an endless count")


def _open_shard(path: Path) -> Shard:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        raw = file.get_tensor("texts").numpy()
        lengths = file.get_tensor("lengths").tolist()
    blocks = {int(name.removeprefix("block.")) for name in names if name.startswith("block.")}

    def load(block: int) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(f"block.{block}")

    return Shard([row.tobytes() for row in raw], lengths, frozenset(blocks), load)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    _write(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there as a whole or not at all."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
