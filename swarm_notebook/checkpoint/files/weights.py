"""The tensors of a checkpoint by name, none of them read before somebody indexes it.

transformers' loader accepts any object in place of a tensor as long as ``x[...]`` gives the tensor
(that is how it reads safetensors itself). So a subset of a checkpoint is a dict from names to
`LazyTensor`; what is not needed is never touched, and of a sharded checkpoint on the Hub only the
shards that hold a needed tensor are downloaded.

A tensor belongs to block k if the first integer part of its name is k: ``model.layers.7.mlp…`` and
``transformer.h.7.attn…`` are block 7, ``lm_head.weight`` is in no block.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from swarm_notebook.checkpoint.files import hub
from swarm_notebook.errors import ModelNotFound

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Of each tensor, from its middle: a page of a disk, about.
SAMPLE_BYTES = 1024
_MAX_HEADER_BYTES = 100_000_000  # of safetensors' own reader

# A tensor's name, dtype and shape, and some of its bytes.
Sample = tuple[str, str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class LazyTensor:
    """Stands for a tensor in a state dict; indexing it reads the tensor."""

    read: Callable[[], torch.Tensor]
    nbytes: int
    slice: Any = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def __getattr__(self, name: str) -> Any:
        # Pre-quantised checkpoints make transformers ask a safetensors slice for shape and dtype.
        return getattr(self.slice, name)


class Weights(Protocol):
    """A checkpoint seen as names of tensors."""

    def names(self) -> list[str]: ...

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]: ...

    def samples(self) -> list[Sample] | None:
        """Some of each tensor as it is stored; None if not all of them are on this machine."""
        ...


def block_index(name: str) -> int | None:
    """The block that the tensor `name` belongs to, or None: embeddings, final norm, head."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def renumbered(name: str, shift: int) -> str:
    """`name` with its block index lowered by `shift`."""
    parts = name.split(".")
    position = next(i for i, part in enumerate(parts) if part.isdecimal())
    parts[position] = str(int(parts[position]) - shift)
    return ".".join(parts)


class SafetensorsWeights:
    """Tensors in one or more safetensors files, memory-mapped.

    :param shards: which file holds which tensor.
    :param locate: gives the local path of a file, downloading it if need be.
    :param here: whether all files are on this machine.
    """

    def __init__(
        self, shards: Mapping[str, str], locate: Callable[[str], Path], *, here: bool = True
    ) -> None:
        self._shards = shards
        self._locate = locate
        self.here = here

    def names(self) -> list[str]:
        return list(self._shards)

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        from safetensors import SafetensorError, safe_open

        wanted = list(names)
        paths = {shard: self._locate(shard) for shard in {self._shards[name] for name in wanted}}
        try:
            files = {shard: safe_open(path, framework="pt") for shard, path in paths.items()}
            return {name: _lazy_slice(files[self._shards[name]].get_slice(name)) for name in wanted}
        except SafetensorError as error:
            where = ", ".join(str(path) for path in sorted(paths.values()))
            raise ModelNotFound(
                f"{where}: not readable as safetensors, or not what {INDEX_FILE} says ({error}); "
                "download the whole model again"
            ) from error

    def headers(self, names: Iterable[str]) -> dict[str, str]:
        """What the files that hold these tensors say of them beside their names and shapes."""
        from safetensors import safe_open

        found: dict[str, str] = {}
        for shard in sorted({self._shards[name] for name in names}):
            with safe_open(self._locate(shard), framework="pt") as file:
                found |= file.metadata() or {}
        return found

    def samples(self) -> list[Sample] | None:
        if not self.here:
            return None
        paths = [self._locate(shard) for shard in sorted(set(self._shards.values()))]
        return [sample for path in paths for sample in _file_samples(path)]


def _file_samples(path: Path) -> list[Sample]:
    """By the file's header: its length in 8 bytes, then JSON, then the tensors' bytes."""
    samples = []
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    file.seek(8 + length + middle(begin, end))
                    sample = file.read(min(SAMPLE_BYTES, end - begin))
                    samples.append((name, str(entry["dtype"]), tuple(entry["shape"]), sample))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelNotFound(f"{path} is not a readable safetensors file: {error!r}") from error
    return samples


def middle(begin: int, end: int) -> int:
    """Where the sample of a tensor with these bytes begins."""
    return max(begin, (begin + end - SAMPLE_BYTES) // 2)


def _lazy_slice(tensor: Any) -> LazyTensor:
    told = re.search(r"\d+", tensor.get_dtype())
    bits = int(told[0]) if told else 8  # BOOL
    return LazyTensor(lambda: tensor[...], math.prod(tensor.get_shape()) * bits // 8, tensor)


def from_folder(folder: Path) -> SafetensorsWeights:
    index = folder / INDEX_FILE
    if index.is_file():
        shards = _read_index(index)
        here = all((folder / shard).is_file() for shard in set(shards.values()))
        return SafetensorsWeights(shards, lambda name: _existing(folder / name), here=here)
    return SafetensorsWeights(_single_file(folder / SINGLE_FILE), lambda name: folder / name)


def from_repository(name: str) -> SafetensorsWeights:
    def locate(filename: str) -> Path:
        path = hub.fetch(name, filename)
        if path is None:
            raise ModelNotFound(
                f"model {name!r}: {filename} is neither on the Hub nor in its cache"
            )
        return path

    index = hub.fetch(name, INDEX_FILE)
    shards = _single_file(locate(SINGLE_FILE)) if index is None else _read_index(index)
    return SafetensorsWeights(shards, locate, here=index is None)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelNotFound(
            f"{path} is missing, though {INDEX_FILE} names it; copy the whole model"
        )
    return path


def _read_index(index: Path) -> dict[str, str]:
    try:
        shards = {str(k): str(v) for k, v in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{index} is not an index of safetensors files: {error!r}") from error
    for shard in set(shards.values()):
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise ModelNotFound(f"{index} points out of its model, at {shard!r}; refused")
    return shards


def _single_file(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path.name)
    except SafetensorError as error:
        raise ModelNotFound(f"{path} is not a readable safetensors file: {error}") from error
