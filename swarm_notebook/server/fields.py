"""Fields of a request's metadata, each read with the type and range that it must have."""

from __future__ import annotations

from typing import Any

from swarm_notebook.errors import BadRequest
from swarm_notebook.net import tensors

MAX_TEXT = 200
MAX_COUNT = 1 << 31
MAX_SECONDS = 24 * 3600.0


def integer(metadata: dict[str, Any], name: str) -> int | None:
    value = metadata.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise BadRequest(f"{name}: {str(value)[:MAX_TEXT]!r}, expected an integer from 0")
    return value


def seconds(metadata: dict[str, Any], name: str) -> float | None:
    value = metadata.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise BadRequest(f"{name}: {str(value)[:MAX_TEXT]!r}, expected seconds from 0")
    return float(value)


def text(metadata: dict[str, Any], name: str) -> str | None:
    value = metadata.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise BadRequest(f"{name}: expected a text of at most {MAX_TEXT} characters")
    return value


def flag(metadata: dict[str, Any], name: str) -> bool:
    value = metadata.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name}: {str(value)[:MAX_TEXT]!r}, expected true or false")
    return bool(value)


def states(value: Any, blocks: tuple[int, int]) -> tuple[int, ...]:
    if value is None:
        return ()
    start, end = blocks
    if (
        not isinstance(value, (list, tuple))
        or len(value) > end - start
        or not all(type(index) is int and start <= index < end for index in value)
    ):
        raise BadRequest(
            f"states: {str(value)[:MAX_TEXT]}, expected indices of blocks in [{start}, {end})"
        )
    return tuple(value)


def compression(value: Any) -> int:
    """The first of Petals' tuple of compressions of the outputs (backward: one or two)."""
    if value is None:
        return tensors.NONE
    known = (tensors.NONE, tensors.FLOAT16)
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2) or value[0] not in known:
        raise BadRequest(
            f"output_compression: {str(value)[:MAX_TEXT]}, expected one of {list(known)}"
        )
    return int(value[0])
