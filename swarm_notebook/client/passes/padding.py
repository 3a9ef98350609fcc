"""Padded batches on Petals' servers, which know no attention mask. Pure code.

Each row is sent without its padding, together with those that have the same, and what comes back
is put at its place. At padding there are zeros then, where a server of ours has what the model
makes of it; no other position depends on that.

A row begins at position 0 there, wherever it begins here. That is the same for all families that
Petals' servers run (Llama, Falcon, Mixtral, BLOOM): their blocks know distances only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from swarm_notebook.client.request import Request
from swarm_notebook.errors import Unsupported


@dataclass(frozen=True)
class UnpaddedRows:
    """Rows of a batch whose tokens all lie at the positions ``[first, last)``."""

    rows: list[int]
    first: int
    last: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their tokens in ``[batch, length, …]``."""
        return tensor[self.rows, self.first : self.last]

    def request(self, request: Request) -> Request:
        """The request for these rows without their padding."""
        prompts = request.prompts
        if prompts is not None:
            prompts = prompts if prompts.shape[1] == 1 else prompts[:, self.rows]
            prompts = prompts[:, :, self.first : self.last]
        return replace(
            request,
            hidden=self.of(request.hidden),
            mask=None,
            position_ids=None,
            prompts=None if prompts is None or not prompts.shape[2] else prompts,
        )


def is_plain(request: Request) -> bool:
    """Whether there is no padding, and positions are counted as usual."""
    return request.mask is None and request.position_ids is None


def without_padding(request: Request, server: str) -> list[UnpaddedRows]:
    """`groups_of_rows` of a request."""
    shape = request.hidden.shape[:2]
    return groups_of_rows(shape, request.mask, request.position_ids, server)


def groups_of_rows(
    shape: Sequence[int],
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    server: str,
) -> list[UnpaddedRows]:
    """The rows of a batch by their padding; rows of nothing else are left out.

    Args:
        shape: rows and positions.
        mask, position_ids: as in `Request`.

    Raises:
        Unsupported: a row has padding, or a jump of its positions, between its tokens.
    """
    batch, length = shape
    mask = torch.ones(batch, length) if mask is None else mask
    ids = torch.arange(length)[None] if position_ids is None else position_ids
    steps = ids.expand(batch, -1).diff(dim=1)
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in range(batch):
        places = mask[row].nonzero()[:, 0].tolist()
        if not places:
            continue
        first, last = places[0], places[-1] + 1
        if last - first != len(places) or not bool((steps[row, first : last - 1] == 1).all()):
            raise Unsupported(
                f"{server} is a Petals server, which supports padding only before or after a row's "
                f"tokens; row {row} has padding, or a jump in position_ids, between them. Use "
                "servers started with `swarm-notebook serve`"
            )
        found[first, last].append(row)
    return [UnpaddedRows(rows, *bounds) for bounds, rows in found.items()]


def put_back(
    groups: Sequence[UnpaddedRows], found: Sequence[torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """What came back for each group as one batch of the shape of ``like``, zeros at padding."""
    whole = torch.zeros_like(like)
    for group, tensor in zip(groups, found, strict=True):
        whole[group.rows, group.first : group.first + tensor.shape[1]] = tensor
    return whole
