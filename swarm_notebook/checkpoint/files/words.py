"""Checkpoints of GPTQ and AWQ, whose integers lie in words of 32 bits.

The libraries that run them want a card. What they compute is defined, though: a weight is
``(integer - zero) * scale``, with a zero and a scale for each group of inputs. So a server takes
the values, tensor by tensor, or keeps the integers (`words_packed`). Shapes, types and scales are
checked before anything is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.weights import LazyTensor, Sample, Weights
from swarm_notebook.errors import ModelNotFound, Unsupported

if TYPE_CHECKING:
    import torch

    from swarm_notebook.checkpoint.words_packed import PackedWords

METHODS = ("gptq", "awq")

_WORD = 32
# The place in a word of each of eight neighbours, by AWQ's "gemm" kernel.
_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class WordWeights:
    """The weights that a checkpoint of GPTQ or AWQ stands for.

    Args:
        stored: its tensors.
        told: its ``quantization_config``.

    Raises:
        Unsupported: it is a variant that is not read.
    """

    def __init__(self, stored: Weights, told: Mapping[str, Any]) -> None:
        self._stored = stored
        self._awq = told.get("quant_method") == "awq"
        self._bits = told.get("bits", 4)
        self._version = told.get("checkpoint_format") or told.get("version") or "gptq"
        read = ("gemm",) if self._awq else ("gptq", "gptq_v2")
        if str(self._version).lower() not in read or self._bits not in (2, 4, 8):
            raise Unsupported(
                f"weights of {told.get('quant_method')} in the format {self._version!r} with "
                f"{self._bits!r} bits are not read; read are {' and '.join(read)} with 2, 4 or 8 "
                "bits. Load them once with the package that wrote them, and save what they stand "
                "for"
            )
        self._group = told.get("group_size", 128)
        self._names = set(stored.names())
        self._packed = {
            name.removesuffix(".qweight") for name in self._names if name.endswith(".qweight")
        }

    def names(self) -> list[str]:
        found = [name for name in self._stored.names() if not self._is_part(name)]
        return [*found, *(f"{module}.weight" for module in self._packed)]

    def lazy(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        wanted = list(names)
        modules = [name.removesuffix(".weight") for name in wanted]
        packed = {module for module in modules if module in self._packed}
        found = self._stored.lazy(name for name in wanted if name[: -len(".weight")] not in packed)
        for module in packed:
            found[f"{module}.weight"] = self._lazy(module, self._parts(module))
        return found

    def packed(self, name: str, _: torch.Size, device: torch.device) -> PackedWords | None:
        """A matrix as it is stored; None if it is stored as it is."""
        module = name.removesuffix(".weight")
        if module not in self._packed:
            return None
        parts = self._parts(module)
        self._check(module, {part: lazy.slice.get_shape() for part, lazy in parts.items()})
        return self._packed_of(module, parts).on(device)

    def packed_bytes(self, name: str, itemsize: int) -> int:
        """What a tensor takes if it stays as it is stored, or is no matrix."""
        module = name.removesuffix(".weight")
        if module not in self._packed:
            return self.count([name]) * itemsize
        parts = self._parts(module)
        groups, rows = parts["scales"].slice.get_shape()
        index = parts["g_idx"].nbytes if "g_idx" in parts else 0
        return parts["qweight"].nbytes + parts["scales"].nbytes + groups * rows + index

    def count(self, names: Iterable[str]) -> int:
        """How many numbers tensors have."""
        found = 0
        for name in names:
            module = name.removesuffix(".weight")
            if module in self._packed:
                words = self._stored.lazy([f"{module}.qweight"])[f"{module}.qweight"]
                found += math.prod(words.slice.get_shape()) * (_WORD // self._bits)
            else:
                found += math.prod(self._stored.lazy([name])[name].slice.get_shape())
        return found

    def _parts(self, module: str) -> dict[str, LazyTensor]:
        names = {part: f"{module}.{part}" for part in _PARTS}
        known = {part: name for part, name in names.items() if name in self._names}
        lazy = self._stored.lazy(known.values())
        return {part: lazy[name] for part, name in known.items()}

    def samples(self) -> list[Sample] | None:
        return self._stored.samples()

    def _is_part(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return module in self._packed and part in _PARTS

    def _lazy(self, module: str, parts: dict[str, LazyTensor]) -> LazyTensor:
        self._check(module, {part: lazy.slice.get_shape() for part, lazy in parts.items()})

        def read() -> torch.Tensor:
            import torch

            return self._packed_of(module, parts).unpack(torch.float32)

        return LazyTensor(read, sum(lazy.nbytes for lazy in parts.values()))

    def _check(self, module: str, shapes: dict[str, list[int]]) -> None:
        """Whether the parts fit each other, by their shapes alone."""
        if missing := {"qweight", "qzeros", "scales"} - set(shapes):
            raise ModelNotFound(f"{module} lacks {', '.join(sorted(missing))}")
        if any(len(shape) != (1 if part == "g_idx" else 2) for part, shape in shapes.items()):
            raise ModelNotFound(f"{module}: its parts have the wrong number of dimensions")
        per_word = _WORD // self._bits
        first, second = shapes["qweight"]
        columns, rows = (first, second * per_word) if self._awq else (first * per_word, second)
        group = columns if self._group == -1 else self._group
        fits = isinstance(group, int) and group > 0 and columns and rows
        groups = math.ceil(columns / group) if fits else 0
        expected = {
            "qweight": [first, second],
            "qzeros": [groups, rows // per_word],
            "scales": [groups, rows],
            "g_idx": [columns],
        }
        for part, shape in shapes.items():
            if not groups or list(shape) != expected[part]:
                raise ModelNotFound(
                    f"{module}.{part} has the shape {tuple(shape)}, where {self._bits} bits in "
                    f"groups of {self._group} and a qweight of {(first, second)} make it "
                    f"{tuple(expected[part])}"
                )

    def _packed_of(self, module: str, parts: Mapping[str, LazyTensor]) -> PackedWords:
        import torch

        from swarm_notebook.checkpoint.words_packed import packed_words

        tensors = {part: lazy.read() for part, lazy in parts.items()}
        words, zero_words, scales = (tensors[part] for part in ("qweight", "qzeros", "scales"))
        if words.dtype != torch.int32 or zero_words.dtype != torch.int32:
            raise ModelNotFound(f"{module}: its integers are not in words of 32 bits")
        if not scales.is_floating_point() or not scales.isfinite().all():
            raise ModelNotFound(f"{module}.scales has NaN or infinity in it; download it again")
        zeros = self._spread(zero_words)
        if self._awq:
            integers = self._spread(words).t()
        else:
            integers = self._spread(words.t())
            if str(self._version).lower() == "gptq":
                zeros = (zeros + 1) & ((1 << self._bits) - 1)  # stored less one
        columns = integers.shape[1]
        groups = torch.arange(columns) // (columns if self._group == -1 else self._group)
        index = tensors.get("g_idx", groups).to(torch.int64)
        if index.min() < 0 or index.max() >= len(scales):
            raise ModelNotFound(
                f"{module}.g_idx names groups that are not there; download it again"
            )
        return packed_words(self._bits, integers, zeros.t(), scales.t(), index)

    def _spread(self, words: torch.Tensor) -> torch.Tensor:
        """``[rows, words]`` to ``[rows, integers]``."""
        import torch

        per_word = _WORD // self._bits
        places = _INTERLEAVED if self._awq else range(per_word)
        shifts = torch.tensor([self._bits * place for place in places], dtype=torch.int32)
        return ((words[:, :, None] >> shifts) & ((1 << self._bits) - 1)).flatten(1)
