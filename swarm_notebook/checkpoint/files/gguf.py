"""Weights in a GGUF file, read and dequantised tensor by tensor.

A GGUF file is a header (typed metadata, then a table of tensors) followed by the tensors' bytes.
The header is parsed here, because the `gguf` package's reader takes five seconds for a vocabulary
of 49,000 tokens, which a server has no use for. Dequantisation is the `gguf` package's.

llama.cpp names tensors in its own way and stores some of them rearranged (Llama's Q and K rows,
experts stacked in parts). transformers knows both, per architecture: its name map and its tensor
processors are used, so that this file knows none.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.weights import SAMPLE_BYTES, LazyTensor, Sample, middle
from swarm_notebook.errors import ModelNotFound, Unsupported

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig

    from swarm_notebook.checkpoint.packed import Packed

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# The metadata's value types; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
# The longest arrays are vocabularies, the largest of which have 262,144 words.
MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the file, and how it is stored."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class _Cursor:
    """Reads little-endian values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = len(MAGIC)

    def take(self, letters: str) -> tuple[Any, ...]:
        layout = f"<{letters}"
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        end = self.position + length
        if end > len(self.data):
            raise ValueError(f"a string of {length} bytes goes beyond the end")
        text = self.data[self.position : end].decode("utf-8", errors="replace")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.take("IQ")
            if count > MAX_ELEMENTS:
                raise ValueError(f"an array of {count} elements")
            if element == _STRING:
                return [self.string() for _ in range(count)]
            return list(self.take(f"{count}{_SCALARS[element]}"))
        return self.take(_SCALARS[kind])[0]


class GgufFile:
    """The header of a GGUF file, and its tensors' values on request."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors, self._start = self._parse()
        except (
            ValueError,
            KeyError,
            TypeError,
            ArithmeticError,
            struct.error,
            MemoryError,
        ) as error:
            raise ModelNotFound(
                f"{path} is not a readable GGUF file ({error}); if it is cut off, download it again"
            ) from error

    def _parse(self) -> tuple[dict[str, Any], dict[str, TensorEntry], int]:
        if self._data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"it begins with {self._data[: len(MAGIC)]!r}")
        cursor = _Cursor(self._data)
        version, tensor_count, value_count = cursor.take("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"version {version}; versions {VERSIONS} are known")
        metadata = {}
        for _ in range(value_count):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.take("I")[0])
        tensors = {}
        for _ in range(tensor_count):
            name = cursor.string()
            # GGUF counts dimensions from the fastest one, torch from the slowest.
            shape = cursor.take(f"{cursor.take('I')[0]}Q")[::-1]
            tensors[name] = TensorEntry(shape, *cursor.take("IQ"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        return metadata, tensors, -(-cursor.position // alignment) * alignment

    def nbytes(self, name: str) -> int:
        """How many bytes a tensor takes in the file."""
        return math.prod(self._byte_shape(name))

    def sample(self, name: str) -> Sample:
        """Some of one tensor as it is stored."""
        entry, count = self.tensors[name], self.nbytes(name)
        begin = middle(self._start + entry.offset, self._start + entry.offset + count)
        found = self._data[begin : begin + min(SAMPLE_BYTES, count)]
        return name, str(entry.kind), tuple(entry.shape), found

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor: its shape, with those of a row in the place of columns."""
        import numpy as np

        shape, count = self._byte_shape(name), self.nbytes(name)
        begin = self._start + self.tensors[name].offset
        if begin + count > len(self._data):
            raise ModelNotFound(f"{self.path} ends before its tensor {name}; download it again")
        return np.frombuffer(self._data, np.uint8, count, begin).reshape(shape)

    def values(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32.

        Raises:
            ModelNotFound: it is cut off, or damaged.
            Unsupported: of a type that is not read.
        """
        import numpy as np
        from gguf.quants import dequantize

        try:
            values = dequantize(self.raw(name), self.kind(name))
        except NotImplementedError as error:
            raise Unsupported(
                f"{self.path}: tensor {name} is of the type {self.kind(name).name}, which the "
                "`gguf` package cannot read; take a file with another quantisation"
            ) from error
        if not np.isfinite(values).all():
            raise ModelNotFound(
                f"{self.path}: tensor {name} has NaN or infinity in it; download it again"
            )
        return values

    def _byte_shape(self, name: str) -> tuple[int, ...]:
        from gguf.quants import quant_shape_to_byte_shape

        try:
            return quant_shape_to_byte_shape(self.tensors[name].shape, self.kind(name))
        except (ValueError, IndexError) as error:
            raise ModelNotFound(
                f"{self.path}: tensor {name} has a shape that its type cannot have: {error}"
            ) from error

    def kind(self, name: str) -> Any:
        """The tensor's `gguf.GGMLQuantizationType`."""
        from gguf import GGMLQuantizationType

        try:
            return GGMLQuantizationType(self.tensors[name].kind)
        except ValueError as error:
            raise Unsupported(f"{self.path}: tensor {name} has an unknown type: {error}") from error


class GgufWeights:
    """The tensors of a GGUF file under the names that transformers gives them.

    :param config: of the causal language model in this file.
    """

    def __init__(self, path: Path, config: PreTrainedConfig) -> None:
        self._file = GgufFile(path)
        self._config = config
        files = [self._file, *_further_parts(path, self._file.metadata.get("split.count", 1))]
        self._files = {name: file for file in files for name in file.tensors}

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        kind = TENSOR_PROCESSORS.get(self._file.metadata["general.architecture"], TensorProcessor)
        return kind(config=self._config.to_dict())

    @cached_property
    def _hf_names(self) -> dict[str, str]:
        """Transformers' name for each GGUF name."""
        import torch
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
        from transformers import AutoModelForCausalLM

        architecture = self._file.metadata["general.architecture"]
        kind = next((kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
        if kind is None:
            raise Unsupported(
                f"{self._file.path}: the `gguf` package does not know the architecture "
                f"{architecture!r}; a newer version may"
            )
        table = get_tensor_name_map(kind, self._config.num_hidden_layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config)
        names: dict[str, str] = {}
        for hf_name in model.state_dict():
            # llama.cpp converts some architectures from the model without its head.
            bare = hf_name.removeprefix(f"{model.base_model_prefix}.")
            for spelling, prefix in ((hf_name, ""), (bare, hf_name.removesuffix(bare))):
                self._add_name(names, table, self._processor.preprocess_name(spelling), prefix)
        return names

    def _add_name(self, names: dict[str, str], table: Any, spelling: str, prefix: str) -> None:
        stem, dot, suffix = spelling.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, dot, suffix = spelling, "", ""
        if (gguf_stem := table.get_name(stem)) is not None:
            names.setdefault(f"{gguf_stem}{dot}{suffix}", prefix + spelling)
        else:
            self._processor.perform_fallback_tensor_mapping(
                names, f"{dot}{suffix}", prefix, spelling
            )

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """The GGUF tensors that make up each of transformers' tensors: usually one."""
        parts: dict[str, list[str]] = {}
        for name in self._files:
            # Stacked experts are mapped without their suffix.
            hf_name = self._hf_names.get(name) or self._hf_names.get(name.removesuffix(".weight"))
            if hf_name is not None:
                parts.setdefault(hf_name, []).append(name)
        return parts

    def names(self) -> list[str]:
        return list(self._parts)

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        return {name: self._lazy(name) for name in names}

    def count(self, names: Iterable[str]) -> int:
        """How many numbers tensors have, by transformers' names."""
        parts = [part for name in names for part in self._parts[name]]
        return sum(math.prod(self._files[part].tensors[part].shape) for part in parts)

    def samples(self) -> list[Sample]:
        return [file.sample(name) for name, file in self._files.items()]

    def packed(self, name: str, shape: torch.Size, device: torch.device) -> Packed | None:
        """A matrix as it is stored; None if it is not stored as one, row by row."""
        import torch

        from swarm_notebook.checkpoint.gguf_packed import PackedGguf

        found = self.rows(name)
        return found and PackedGguf(found[0], shape, torch.from_numpy(found[1]).to(device))

    def packed_bytes(self, name: str, itemsize: int) -> int:
        """What a tensor takes if it stays as it is stored, or is no matrix."""
        matrix = len(self._parts[name]) == 1 and self._matrix(self._parts[name][0])
        return self._lazy(name).nbytes if matrix else self.count([name]) * itemsize

    def _matrix(self, part: str) -> bool:
        file = self._files[part]
        return len(file.tensors[part].shape) > 1 and file.kind(part).name != "F32"

    def _lazy(self, name: str) -> LazyTensor:
        nbytes = sum(self._files[part].nbytes(part) for part in self._parts[name])
        return LazyTensor(lambda: self._read(name), nbytes)

    def _read(self, name: str) -> torch.Tensor:
        import numpy as np
        import torch

        read: dict[str, torch.Tensor] = {}
        for part in self._parts[name]:
            result = self._processor.process(
                weights=self._files[part].values(part),
                name=part,
                tensor_key_mapping=self._hf_names,
                parsed_parameters={"tensors": read},
            )
            if result.name is not None:  # None: the processor has filed the tensor itself
                read[self._hf_names[result.name]] = torch.from_numpy(np.array(result.weights))
        return read[name]

    def rows(self, name: str) -> tuple[Any, np.ndarray] | None:
        """A tensor's type and bytes, ``[rows, bytes of a row]``, in transformers' order of rows.

        None if it is stored in several tensors or in float32, or not row by row.
        """
        import numpy as np

        if len(self._parts[name]) != 1:
            return None
        (part,) = self._parts[name]
        file = self._files[part]
        shape, kind = file.tensors[part].shape, file.kind(part)
        if not self._matrix(part):
            return None
        raw = file.raw(part).reshape(-1, file.raw(part).shape[-1])
        # Where the rows go shows in what becomes of their numbers; float32 holds them exactly.
        if len(raw) > 1 << 24:
            return None
        numbers = np.repeat(np.arange(len(raw), dtype=np.float32), shape[-1]).reshape(shape)
        result = self._processor.process(
            weights=numbers,
            name=part,
            tensor_key_mapping=self._hf_names,
            parsed_parameters={"tensors": {}},
        )
        if result.name is None or result.weights.shape[-1] != shape[-1]:
            return None
        moved = result.weights.reshape(-1, shape[-1])
        if not (moved == moved[:, :1]).all():
            return None
        return kind, raw[moved[:, 0].astype(np.int64)]


def _further_parts(path: Path, count: int) -> list[GgufFile]:
    """The other files of a model that is split into ``count``, of which `path` is the first."""
    if count <= 1:
        return []
    found = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not found or int(found[3]) != count or int(found[2]) != 1:
        raise ModelNotFound(
            f"{path} is one of {count} parts of a split GGUF file; give the first of them, "
            f"NAME-00001-of-{count:05}.gguf, with the others beside it"
        )
    others = [path.with_name(f"{found[1]}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)]
    missing = [other.name for other in others if not other.is_file()]
    if missing:
        raise ModelNotFound(f"{path.parent} lacks {missing[0]} ({len(missing)} of {count} parts)")
    return [GgufFile(other) for other in others]
