"""Fields of a request's metadata, each read with the type and range that it must have."""

from __future__ import annotations

from typing import Any

import torch

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.wire import codecs, prints, protocol, tensors

# Ids have 36 characters and names a few more; nobody reads 1,024 modules at once; a chain has at
# most a server per block; nobody waits for a day.
MAX_TEXT = 200
MAX_INNER = 1024
MAX_SERVERS = 512
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


def dtype(metadata: dict[str, Any], name: str) -> torch.dtype | None:
    """A floating point dtype by its wire name."""
    value = text(metadata, name)
    if value is None:
        return None
    found = tensors.float_dtype(value)
    if found is None:
        raise BadRequest(f"{name}: {value!r}, expected float32, bfloat16 or float16")
    return found


def seed_of_prints(metadata: dict[str, Any]) -> bytes | None:
    """By which the server is to say what was pushed to it."""
    value = metadata.get(protocol.PRINT)
    if value is not None and (not isinstance(value, bytes) or len(value) != prints.SEED_BYTES):
        raise BadRequest(f"{protocol.PRINT}: expected a seed of {prints.SEED_BYTES} bytes")
    return value


def target(metadata: dict[str, Any], name: str) -> tuple[str, str]:
    """A peer id and a session id."""
    value = metadata.get(name)
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(isinstance(part, str) and 0 < len(part) <= MAX_TEXT for part in value)
    ):
        raise BadRequest(f"{name}: {str(value)[:MAX_TEXT]}, expected a peer id and a session id")
    return value[0], value[1]


def next_servers(metadata: dict[str, Any], end: int) -> list[tuple[str, str, int, int]]:
    """Peer id, session id and blocks of the servers for what follows on block ``end - 1``."""
    value = metadata.get(protocol.NEXT_SERVERS)
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_SERVERS:
        raise BadRequest(
            f"{protocol.NEXT_SERVERS}: {str(value)[:MAX_TEXT]}, expected 1 to {MAX_SERVERS} servers"
        )
    found: list[tuple[str, str, int, int]] = []
    for entry in value:
        peer, session, start, stop = (
            entry if isinstance(entry, (list, tuple)) and len(entry) == 4 else ("", "", 0, 0)
        )
        if (
            not all(isinstance(part, str) and 0 < len(part) <= MAX_TEXT for part in (peer, session))
            or not all(type(index) is int for index in (start, stop))
            or not end == start < stop <= protocol.MAX_BLOCKS
        ):
            raise BadRequest(
                f"{protocol.NEXT_SERVERS}: {str(entry)[:MAX_TEXT]}, expected a peer id, a session "
                f"id and blocks from {end} on"
            )
        found.append((peer, session, start, stop))
        end = stop
    return found


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


def adapter(value: Any) -> tuple[str, int]:
    """An adapter's id and version."""
    if not isinstance(value, dict):
        raise BadRequest(f"adapter: {str(value)[:MAX_TEXT]!r}, expected id and version")
    name, version = text(value, "id"), integer(value, "version")
    if not name or version is None:
        raise BadRequest(f"adapter: {str(value)[:MAX_TEXT]}, expected id and version")
    return name, version


def by_row(value: Any, rows: int) -> dict[str, list[Any]] | None:
    """What PEFT tells an adapter's layers for this call, one value for each row."""
    if value is None:
        return None
    kinds: dict[str, Any] = {"adapter_names": str, "alora_offsets": int}
    if not isinstance(value, dict) or not value.keys() <= kinds.keys():
        raise BadRequest(f"by_row: {str(value)[:MAX_TEXT]}, expected lists for {', '.join(kinds)}")
    for name, told in value.items():
        if (
            not isinstance(told, (list, tuple))
            or len(told) != rows
            or not all(one is None or type(one) is kinds[name] for one in told)
        ):
            raise BadRequest(f"{name}: {str(told)[:MAX_TEXT]}, expected one value for each row")
    return {name: list(told) for name, told in value.items()}


def inner(value: Any, blocks: tuple[int, int]) -> tuple[tuple[int, str], ...]:
    """Modules inside of blocks, as pairs of a block and a dotted name."""
    if value is None:
        return ()
    start, end = blocks
    if not isinstance(value, (list, tuple)) or len(value) > MAX_INNER:
        raise BadRequest(f"inner: expected a list of at most {MAX_INNER} [block, module]")
    found: list[tuple[int, str]] = []
    for entry in value:
        pair = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (-1, "")
        index, name = pair
        if type(index) is not int or not start <= index < end or not _is_module_name(name):
            raise BadRequest(
                f"inner: {str(entry)[:MAX_TEXT]}, expected [block in [{start}, {end}), module name]"
            )
        found.append((index, name))
    if len(set(found)) < len(found):
        raise BadRequest("inner: a module is named twice")
    return tuple(found)


def _is_module_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_TEXT
        and all(part.isidentifier() or part.isdecimal() for part in name.split("."))
    )


def compression(value: Any) -> int:
    """The first of Petals' tuple of compressions of the outputs (backward: one or two)."""
    if value is None:
        return tensors.NONE
    known = (tensors.NONE, tensors.FLOAT16, tensors.INT8, *sorted(codecs.CODECS))
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2) or value[0] not in known:
        raise BadRequest(
            f"output_compression: {str(value)[:MAX_TEXT]}, expected one of {list(known)}"
        )
    return int(value[0])
