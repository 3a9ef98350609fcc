"""Weights in a GGUF file, read and dequantised tensor by tensor.

A GGUF file is a header (typed metadata, then a table of tensors) followed by the tensors' bytes.
The header is parsed here, because the `gguf` package's reader takes five seconds for a vocabulary
of 49,000 tokens, which a server has no use for. Dequantisation is the `gguf` package's.

llama.cpp names tensors in its own way and stores some of them rearranged (Llama's Q and K rows,
experts stacked in parts). transformers knows both, per architecture: its name map and its tensor
processors are used, so that this file knows none.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.weights import SAMPLE_BYTES, LazyTensor, Sample, middle
from swarm_notebook.errors import ModelNotFound, Unsupported

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# The metadata's value types; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9


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
            if element == _STRING:
                return [self.string() for _ in range(count)]
            return list(self.take(f"{count}{_SCALARS[element]}"))
        return self.take(_SCALARS[kind])[0]


class GgufFile:
    """The header of a GGUF file, and its tensors' values on request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors, self._start = self._parse()
        except (ValueError, KeyError, struct.error, MemoryError) as error:
            raise ModelNotFound(
                f"{path} is not a readable GGUF file ({error}); it may be cut off: fetch it again"
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
        from gguf.quants import quant_shape_to_byte_shape

        entry = self.tensors[name]
        *rows, width = quant_shape_to_byte_shape(entry.shape, self._kind(name))
        count = width
        for size in rows:
            count *= size
        return count

    def sample(self, name: str) -> Sample:
        """Some of one tensor as it is stored."""
        entry, count = self.tensors[name], self.nbytes(name)
        begin = middle(self._start + entry.offset, self._start + entry.offset + count)
        found = self._data[begin : begin + min(SAMPLE_BYTES, count)]
        return name, str(entry.kind), tuple(entry.shape), found

    def values(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32."""
        import numpy as np
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        entry, kind = self.tensors[name], self._kind(name)
        begin, count = self._start + entry.offset, self.nbytes(name)
        if begin + count > len(self._data):
            raise ModelNotFound(f"{self.path} ends before its tensor {name}; fetch it again")
        raw = np.frombuffer(self._data, np.uint8, count, begin)
        return dequantize(raw.reshape(quant_shape_to_byte_shape(entry.shape, kind)), kind)

    def _kind(self, name: str) -> Any:
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
        if self._file.metadata.get("split.count", 1) > 1:
            raise Unsupported(
                f"{path} is one of several parts of a split GGUF file; join them first with "
                "`llama-gguf-split --merge`"
            )

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
        for name in self._file.tensors:
            # Stacked experts are mapped without their suffix.
            hf_name = self._hf_names.get(name) or self._hf_names.get(name.removesuffix(".weight"))
            if hf_name is not None:
                parts.setdefault(hf_name, []).append(name)
        return parts

    def names(self) -> list[str]:
        return list(self._parts)

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        return {name: self._lazy(name) for name in names}

    def samples(self) -> list[Sample]:
        return [self._file.sample(name) for name in self._file.tensors]

    def _lazy(self, name: str) -> LazyTensor:
        nbytes = sum(self._file.nbytes(part) for part in self._parts[name])
        return LazyTensor(lambda: self._read(name), nbytes)

    def _read(self, name: str) -> torch.Tensor:
        import numpy as np
        import torch

        read: dict[str, torch.Tensor] = {}
        for part in self._parts[name]:
            result = self._processor.process(
                weights=self._file.values(part),
                name=part,
                tensor_key_mapping=self._hf_names,
                parsed_parameters={"tensors": read},
            )
            if result.name is not None:  # None: the processor has filed the tensor itself
                read[self._hf_names[result.name]] = torch.from_numpy(np.array(result.weights))
        return read[name]
