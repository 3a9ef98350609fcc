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


def _unfit(name: str, value: object, expected: str) -> BadRequest:
    return BadRequest(f"{name}: {str(value)[:MAX_TEXT]!r}, expected {expected}")


def integer(metadata: dict[str, Any], name: str) -> int | None:
    value = metadata.get(name)
    if value is None or (type(value) is int and 0 <= value < MAX_COUNT):
        return value
    raise _unfit(name, value, "an integer from 0")


def seconds(metadata: dict[str, Any], name: str) -> float | None:
    value = metadata.get(name)
    if value is None:
        return None
    if type(value) in (int, float) and 0 <= value <= MAX_SECONDS:
        return float(value)
    raise _unfit(name, value, "seconds from 0")


def text(metadata: dict[str, Any], name: str) -> str | None:
    value = metadata.get(name)
    if value is None or _is_text(value, least=0):
        return value
    raise _unfit(name, value, f"a text of at most {MAX_TEXT} characters")


def _is_text(value: object, least: int = 1) -> bool:
    return isinstance(value, str) and least <= len(value) <= MAX_TEXT


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


def some_bytes(metadata: dict[str, Any], name: str, most: int) -> bytes:
    """So many bytes at most; none if they are not there."""
    value = metadata.get(name, b"")
    if isinstance(value, bytes) and len(value) <= most:
        return value
    raise BadRequest(f"{name}: expected at most {most} bytes")


def target(metadata: dict[str, Any], name: str) -> tuple[str, str]:
    """A peer id and a session id."""
    return _two_texts(metadata, name, "a peer id and a session id")


def session_and_step(metadata: dict[str, Any], name: str) -> tuple[str, str]:
    """A session id and a step id."""
    return _two_texts(metadata, name, "a session id and a step id")


def _two_texts(metadata: dict[str, Any], name: str, expected: str) -> tuple[str, str]:
    value = metadata.get(name)
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_text, value)):
        return value[0], value[1]
    raise _unfit(name, value, expected)


def next_servers(metadata: dict[str, Any], end: int) -> list[tuple[str, str, int, int]]:
    """Peer id, session id and blocks of the servers for what follows on block ``end - 1``."""
    value = metadata.get(protocol.NEXT_SERVERS)
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_SERVERS:
        raise _unfit(protocol.NEXT_SERVERS, value, f"1 to {MAX_SERVERS} servers")
    found: list[tuple[str, str, int, int]] = []
    for entry in value:
        peer, session, start, stop = (
            entry if isinstance(entry, (list, tuple)) and len(entry) == 4 else ("", "", 0, 0)
        )
        if (
            not (_is_text(peer) and _is_text(session))
            or not all(type(index) is int for index in (start, stop))
            or not end == start < stop <= protocol.MAX_BLOCKS
        ):
            expected = f"a peer id, a session id and blocks from {end} on"
            raise _unfit(protocol.NEXT_SERVERS, entry, expected)
        found.append((peer, session, start, stop))
        end = stop
    return found


def flag(metadata: dict[str, Any], name: str) -> bool:
    value = metadata.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _unfit(name, value, "true or false")


def states(value: Any, blocks: tuple[int, int]) -> tuple[int, ...]:
    if value is None:
        return ()
    start, end = blocks
    if (
        not isinstance(value, (list, tuple))
        or len(value) > end - start
        or not all(type(index) is int and start <= index < end for index in value)
    ):
        raise _unfit("states", value, f"indices of blocks in [{start}, {end})")
    return tuple(value)


def adapter(value: Any) -> tuple[str, int]:
    """An adapter's id and version."""
    if isinstance(value, dict):
        name, version = text(value, "id"), integer(value, "version")
        if name and version is not None:
            return name, version
    raise _unfit("adapter", value, "id and version")


def by_row(value: Any, rows: int) -> dict[str, list[Any]] | None:
    """What PEFT tells an adapter's layers for this call, one value for each row."""
    if value is None:
        return None
    kinds: dict[str, Any] = {"adapter_names": str, "alora_offsets": int}
    if not isinstance(value, dict) or not value.keys() <= kinds.keys():
        raise _unfit("by_row", value, f"lists for {', '.join(kinds)}")
    for name, told in value.items():
        if (
            not isinstance(told, (list, tuple))
            or len(told) != rows
            or not all(one is None or type(one) is kinds[name] for one in told)
        ):
            raise _unfit(name, told, "one value for each row")
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
            raise _unfit("inner", entry, f"[block in [{start}, {end}), module name]")
        found.append((index, name))
    if len(set(found)) < len(found):
        raise BadRequest("inner: a module is named twice")
    return tuple(found)


def _is_module_name(name: Any) -> bool:
    return _is_text(name) and all(
        part.isidentifier() or part.isdecimal() for part in name.split(".")
    )


def compression(value: Any) -> int:
    """The first of Petals' tuple of compressions of the outputs (backward: one or two)."""
    if value is None:
        return tensors.NONE
    known = (tensors.NONE, tensors.FLOAT16, tensors.INT8, *sorted(codecs.CODECS))
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 2) or value[0] not in known:
        raise _unfit("output_compression", value, f"one of {list(known)}")
    return int(value[0])
