"""What would travel along a chain of servers, before anything does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.net.wire import tensors


def loads(
    directory: Directory, chain: Sequence[RouteSegment], width: int, dtype: torch.dtype
) -> list[tuple[int, int]]:
    """Bytes of one hidden state to and from each server; none to one that is handed it.

    Args:
        width: how many values a hidden state has.
        dtype: what the notebook computes in.
    """
    found: list[tuple[int, int]] = []
    before: RouteSegment | None = None
    for segment in chain:
        span = segment.span
        compression = directory.compression_for(span)
        size = tensors.state_bytes(width, dtype, span.info.torch_dtype, compression)
        follows = before is not None and before.end == segment.start
        handed = before is not None and follows and directory.together(before.span, span)
        found.append((0 if handed else size, size))
        before = segment
    return found


def answered(directory: Directory, chain: Sequence[RouteSegment], length: int) -> int:
    """Of how many of a prompt's ``length`` positions the last server's output comes back.

    On average, where more are asked for in some prompts.
    """
    ends = bool(chain) and chain[-1].end == directory.num_blocks
    if not ends or not chain[-1].span.shortens:
        return length
    if directory.audits is None:
        return min(length, 1)
    more, share = directory.audits.more_asked(chain[-1], 1, length, length * len(chain))
    return round(share * more + (1 - share) * min(length, 1))
