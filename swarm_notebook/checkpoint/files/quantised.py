"""Checkpoints whose weights were quantised before: transformers' own quantizers read them.

A config says how (`quantization_config`) and by their names which modules were left out. A server
has some blocks only, and they count from zero there, so their names change with them. No format is
known here; what a quantizer's library refuses, or lacks, becomes one typed sentence, before any
weight is read.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from swarm_notebook.checkpoint.files.weights import (
    LazyTensor,
    SafetensorsWeights,
    Weights,
    block_index,
    renumbered,
)
from swarm_notebook.errors import SwarmError, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger: logging.Logger = logging.getLogger(__name__)

# Of safetensors: what weights that nobody has quantised are stored in.
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def method_of(config: PreTrainedConfig) -> str | None:
    """What quantised the weights, by transformers' name; None if nothing did.

    Raises:
        Unsupported: transformers does not know it. It would take the numbers for the weights.
    """
    told = settings_of(config)
    if not told:
        return None
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    name = told.get("quant_method")
    method = getattr(name, "value", name)  # an enum, or its word
    try:
        known = AutoHfQuantizer.supports_quant_method(told)
    except (ValueError, TypeError) as error:
        raise Unsupported(f"the config's quantization_config is unreadable: {error}") from error
    if not known:
        raise Unsupported(
            f"the weights were quantised by {method!r}, which transformers does not know; it knows "
            f"{', '.join(sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))}"
        )
    return str(method or "bitsandbytes")


def check_loads(name: str, method: str) -> None:
    """Refuse what transformers names, but has no way to load, whatever libraries are there.

    Its quantizer then wants parameters for itself, and has no operation for them; what comes of
    that are tensors that seem to be missing, or another library that does not help.

    Args:
        name: of the model.
        method: as `method_of` has it.

    Raises:
        Unsupported: it cannot.
    """
    from transformers import __version__
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    kind: Any = AUTO_QUANTIZER_MAPPING.get(method, HfQuantizer)
    wants = kind.param_needs_quantization is not HfQuantizer.param_needs_quantization
    if wants and kind.get_quantize_ops is HfQuantizer.get_quantize_ops:
        raise Unsupported(
            f"the weights of {name} were quantised by {method}, which transformers {__version__} "
            "knows but cannot load, with its library or without; serve the model's float weights "
            "with --bits, or another checkpoint of it"
        )


def for_blocks(
    config: PreTrainedConfig, start: int, end: int, prefix: str, *, on_cpu: bool
) -> None:
    """Let what a config says of single modules be about blocks start..end-1, counted from zero.

    Args:
        prefix: of the names in a model with a head, such as ``model``; blocks alone have none.
        on_cpu: whether they will be there. What has no products for it is unpacked at the latest
            when it is first called, by some quantizers; here it is while it is read.
    """
    told = settings_of(config)
    if told:
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        here = _names_of(start, end, prefix)
        kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(method_of(config)))
        if on_cpu and kind is not None and "dequantize" in inspect.signature(kind).parameters:
            told["dequantize"] = True
        config.quantization_config = _mapped(told, here)


def headers_of_blocks(
    weights: Weights, names: Iterable[str], start: int, end: int, prefix: str
) -> dict[str, str]:
    """What the headers of a checkpoint's files say of some tensors, as if they had only these.

    torchao writes there what its tensors are made of, by their names.
    """
    if not isinstance(weights, SafetensorsWeights):
        return {}
    here = _names_of(start, end, prefix)
    found = {}
    for key, text in _mapped(weights.headers(names), here).items():
        try:
            listed = json.loads(text)
        except ValueError:
            listed = None
        found[key] = json.dumps(_mapped(listed, here)) if isinstance(listed, list) else text
    return found


@contextmanager
def telling(headers: Mapping[str, str]) -> Iterator[None]:
    """Quantizers get these headers of files; of a part of a model there are no files.

    For whoever holds the lock of `parts.loading`: transformers' base class is changed meanwhile.
    """
    from transformers.quantizers.base import HfQuantizer

    kind: Any = HfQuantizer
    plain = kind.preprocess_model

    def preprocess(self: Any, *args: Any, **named: Any) -> Any:
        self.metadata = dict(headers)
        return plain(self, *args, **named)

    kind.preprocess_model = preprocess
    try:
        yield
    finally:
        kind.preprocess_model = plain


def _names_of(start: int, end: int, prefix: str) -> Callable[[str], list[str]]:
    """What a name in a whole model is among blocks start..end-1; nothing if it is not there."""

    def here(name: str) -> list[str]:
        index = block_index(name)
        if index is None:
            return [name]
        if not start <= index < end:
            return []
        local = renumbered(name, start)
        return [local, local.removeprefix(f"{prefix}.")]

    return here


def is_float(tensors: Iterable[tuple[str, LazyTensor]]) -> bool:
    """Whether tensors of a quantised checkpoint are weights as they were before."""
    return all(
        name.endswith((".weight", ".bias"))
        and lazy.slice is not None
        and lazy.slice.get_dtype() in _FLOATS
        for name, lazy in tensors
    )


def without_quantizer(config: PreTrainedConfig) -> None:
    """Describe a part of a model that nobody has quantised: no library is needed for it."""
    if settings_of(config):
        del config.quantization_config


@contextmanager
def explained(name: str, method: str | None) -> Iterator[None]:
    """What a quantizer does not do becomes one sentence.

    Args:
        name: of the model.
        method: as `method_of` has it.

    Raises:
        Unsupported: it does not load such weights here, or its library is not installed.
    """
    try:
        yield
    except SwarmError:
        raise
    except ImportError as error:
        raise Unsupported(
            f"{name} cannot be loaded without another package: {_first_line(error)}"
        ) from error
    except Exception as error:
        if method is None:
            raise
        logger.debug("a quantizer failed", exc_info=True)
        raise Unsupported(
            f"the weights of {name} were quantised by {method}, which does not load a part of them "
            f"here ({_first_line(error)}); take another checkpoint of the model, or load this one "
            "with transformers where that works, and save what model.dequantize() gives"
        ) from error


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's ``quantization_config``; empty if it has none."""
    told = getattr(config, "quantization_config", None)
    return dict(told if isinstance(told, dict) else told.to_dict()) if told is not None else {}


def _mapped(value: Any, here: Any) -> Any:
    """The same with every name of a module in a list, or as a key, as it is here."""
    if isinstance(value, dict):
        names = [(name, key) for key in value for name in (here(key) if _is_name(key) else [key])]
        return {name: _mapped(value[key], here) for name, key in names}
    if isinstance(value, list):
        return [
            found
            for one in value
            for found in (here(one) if _is_name(one) else [_mapped(one, here)])
        ]
    return value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and "." in value


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
