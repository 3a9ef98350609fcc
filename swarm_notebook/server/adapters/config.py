"""What of a PEFT config is believed when it comes from a peer.

Only the fields in `TUNERS` reach PEFT, each checked; fields without a meaning here (where the
model came from, how weights were initialised) are dropped; any other field must be unset. So a
config cannot make PEFT read files, import modules, change base weights or allocate beyond the
announced rank. Which modules are tuned is not read from here at all: it follows from the names of
the uploaded parameters (but for LoRA on bare parameters, as of fused experts). The patterns that
remain are regular expressions, and as such restricted to forms that cannot take long.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm_notebook.errors import BadRequest

# Of one notebook's adapters: a config of PEFT has some kB and lists at most the modules of a block.
MAX_CONFIGS = 16
MAX_CONFIG_CHARS = 1 << 18
MAX_ENTRIES = 256

_NAME = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)
_DOTTED = re.compile(r"[\w.]{1,200}", re.ASCII)
_PATTERN = re.compile(r"[\w.\\^$|():\[\]*+?-]{1,200}", re.ASCII)
_SHOWN = 80

Check = Callable[[Any, int], Any]


@dataclass(frozen=True)
class TunerConfig:
    """A checked config of one adapter.

    Attributes:
        name: of the adapter, as PEFT knows it.
        kind: PEFT's name of the tuner type.
        values: the fields for PEFT's config class.
    """

    name: str
    kind: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Tuner:
    """A tuner type that is accepted: the fields to check, and how its parameters' names begin."""

    prefix: str
    fields: Mapping[str, Check]


def parse_configs(value: Any, max_rank: int) -> tuple[TunerConfig, ...]:
    """The configs of an upload: ``{adapter name: JSON text}``.

    Raises:
        BadRequest: a name, a tuner type, a field or its value is not accepted.
    """
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_CONFIGS:
        raise BadRequest(f"configs: expected a dict of 1 to {MAX_CONFIGS} PEFT configs by name")
    configs = tuple(_parse_config(name, text, max_rank) for name, text in value.items())
    kinds = sorted({config.kind for config in configs})
    if len(kinds) > 1:
        raise BadRequest(f"configs: types {', '.join(kinds)}; adapters active together share one")
    return configs


def _parse_config(name: Any, text: Any, max_rank: int) -> TunerConfig:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadRequest(f"configs: {str(name)[:_SHOWN]!r} is no name of letters, digits and _")
    where = f"config of {name!r}"
    if not isinstance(text, str) or len(text) > MAX_CONFIG_CHARS:
        raise BadRequest(f"{where}: expected JSON of at most {MAX_CONFIG_CHARS} characters")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{where}: no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise BadRequest(f"{where}: a {type(fields).__name__}, expected the fields of a config")
    kind = fields.pop("peft_type", None)
    tuner = TUNERS.get(kind) if isinstance(kind, str) else None
    if tuner is None:
        raise BadRequest(
            f"{where}: peft_type {str(kind)[:_SHOWN]!r} is not accepted, use one of "
            f"{', '.join(TUNERS)}"
        )
    return TunerConfig(name, kind, _checked(where, tuner, fields, max_rank))


def _checked(where: str, tuner: Tuner, fields: dict[str, Any], max_rank: int) -> dict[str, Any]:
    """The fields that PEFT may see."""
    values = {}
    for field, value in fields.items():
        if value is None:
            continue
        if field in tuner.fields:
            try:
                values[field] = tuner.fields[field](value, max_rank)
            except ValueError as error:
                shown = str(value)[:_SHOWN]
                raise BadRequest(f"{where}: {field} {shown!r}, expected {error}") from None
        elif field not in _DROPPED and value:
            raise BadRequest(f"{where}: {field[:_SHOWN]} is not supported by servers, leave it out")
    return values


def _rank(value: Any, max_rank: int) -> int:
    if type(value) is not int or not 1 <= value <= max_rank:
        raise ValueError(f"a rank from 1 to {max_rank}, the limit of this server")
    return value


def _flag(value: Any, _: int) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _number(value: Any, _: int) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _whole(value: Any, _: int) -> int:
    if type(value) is not int or not -1 <= value < 1 << 31:
        raise ValueError("a whole number")
    return value


def _probability(value: Any, _: int) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError("a probability")
    return float(value)


def _no_bias(value: Any, _: int) -> str:
    if value != "none":
        raise ValueError("'none': biases of the base model are not trained here")
    return "none"


def _plain_start(value: Any, _: int) -> bool:
    """Not passed on as it is: every parameter is uploaded."""
    if value not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError("an initialisation that leaves the base weights alone")
    return True


def _patterns(check: Check) -> Check:
    def checked(value: Any, max_rank: int) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
            raise ValueError(f"up to {MAX_ENTRIES} values by module name")
        for pattern in value:
            _harmless(pattern, loops=1)
        return {pattern: check(found, max_rank) for pattern, found in value.items()}

    return checked


def _modules(value: Any, _: int) -> list[str] | str:
    if isinstance(value, str):
        _harmless(value, loops=3)
        return value
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise ValueError(f"up to {MAX_ENTRIES} module names or a pattern")
    if not all(isinstance(name, str) and len(name) <= 200 for name in value):
        raise ValueError("module names")
    return value


def _parameters(value: Any, _: int) -> list[str]:
    names = isinstance(value, list) and len(value) <= MAX_ENTRIES
    if not names or not all(isinstance(name, str) and _DOTTED.fullmatch(name) for name in value):
        raise ValueError(f"up to {MAX_ENTRIES} names of parameters")
    return value


def _harmless(pattern: str, loops: int) -> None:
    """Refuse regular expressions that could take long on a module's name."""
    simple = _PATTERN.fullmatch(pattern) and not re.search(r"\)[*+]", pattern)
    if not simple or len(re.findall(r"[*+]", pattern)) > loops:
        raise ValueError(f"module names or patterns with at most {loops} of * and +")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None


_DROPPED = frozenset(
    {
        # Where and how the adapter was made.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "ensure_weight_tying"),
        # Which modules are tuned: the names of the parameters say so.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # About modules outside of the blocks.
        *("modules_to_save", "trainable_token_indices"),
        # Without a meaning as long as what they belong to is unset.
        *("megatron_core", "qalora_group_size", "init_weights", "init_ia3_weights"),
    }
)

TUNERS: Mapping[str, Tuner] = {
    "LORA": Tuner(
        "lora_",
        {
            "r": _rank,
            "rank_pattern": _patterns(_rank),
            "lora_alpha": _number,
            "alpha_pattern": _patterns(_number),
            "lora_dropout": _probability,
            "lora_bias": _flag,
            "use_rslora": _flag,
            "use_dora": _flag,
            "fan_in_fan_out": _flag,
            "init_lora_weights": _plain_start,
            "bias": _no_bias,
            "target_parameters": _parameters,
        },
    ),
    "IA3": Tuner("ia3_", {"feedforward_modules": _modules, "fan_in_fan_out": _flag}),
    "LOHA": Tuner(
        "hada_",
        {
            "r": _rank,
            "rank_pattern": _patterns(_rank),
            "alpha": _number,
            "alpha_pattern": _patterns(_number),
            "rank_dropout": _probability,
            "module_dropout": _probability,
        },
    ),
    "LOKR": Tuner(
        "lokr_",
        {
            "r": _rank,
            "rank_pattern": _patterns(_rank),
            "alpha": _number,
            "alpha_pattern": _patterns(_number),
            "rank_dropout": _probability,
            "rank_dropout_scale": _flag,
            "module_dropout": _probability,
            "decompose_both": _flag,
            "decompose_factor": _whole,
        },
    ),
}
