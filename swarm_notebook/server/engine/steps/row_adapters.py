"""The adapters of the rows of a step, in a table that a graph reads.

Each row may have its own, or none, and another one in the next step. Only what plain LoRA adds can
be told in a table (see `adapters.low_rank`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import nn

from swarm_notebook.server.adapters.low_rank import COLUMNS, Additions
from swarm_notebook.server.adapters.mixing import Site, Unmixable, module_at
from swarm_notebook.server.engine.span import Span


class RowAdapters:
    """The table.

    Args:
        span: the blocks that run.
        blocks: ``[start, end)``.
        names: of the modules that adapters may tune.
        ranks: the largest, a multiple of `RANKS`.
    """

    def __init__(
        self, span: Span, blocks: tuple[int, int], names: frozenset[str], rows: int, ranks: int
    ):
        self._span, self._ranks = span, ranks
        self._sites = tuple(
            (index, name)
            for index in range(*blocks)
            for name, _ in span.layer(index).named_modules()
            if name in names
        )
        on_card = span.device.type == "cuda"
        here = torch.zeros(len(self._sites), rows, COLUMNS, dtype=torch.int64)
        self._here = here.pin_memory() if on_card else here
        self._table = self._here.to(span.device, copy=True)
        self._lines = self._here.numpy()
        # Whoever drops an adapter gets its memory back, though its rows were the last ones here.
        self._rows: list[ref[Additions] | None] = [None] * rows
        self._columns: list[np.ndarray | None] = [None] * rows
        # By adapter, with the version that they are of.
        self._known: WeakKeyDictionary[Additions, tuple[int, np.ndarray]] = WeakKeyDictionary()

    def fill(self, adapters: Sequence[tuple[Additions | None, int]]) -> None:
        """Write down whose adapter each row has.

        Args:
            adapters: of sessions, and how many rows they have.
        """
        rows = [adapter for adapter, count in adapters for _ in range(count)]
        rows += [None] * (len(self._rows) - len(rows))
        changed = False
        for row, adapter in enumerate(rows):
            column = None if adapter is None else self._column(adapter)
            if column is not self._columns[row]:
                self._columns[row], changed = column, True
                self._lines[:, row] = 0 if column is None else column
        self._rows = [None if adapter is None else ref(adapter) for adapter in rows]
        if changed:
            self._table.copy_(self._here, non_blocking=True)

    def _column(self, adapter: Additions) -> np.ndarray:
        version, column = self._known.get(adapter, (-1, None))
        if column is None or version != adapter.version:
            column = adapter.column(self._sites)
            self._known[adapter] = adapter.version, column
        return column

    @contextmanager
    def applied(self, *, plainly: bool) -> Iterator[None]:
        """Have what is called meanwhile give its rows what their adapters add.

        Args:
            plainly: by torch's own products, row by row: whatever the device, but in no graph.
        """
        with ExitStack() as hooks:
            for index, site in enumerate(self._sites):
                hook = self._hook(index, site, plainly)
                hooks.enter_context(module_at(self._span, site).register_forward_hook(hook))
            yield

    def _hook(self, index: int, site: Site, plainly: bool) -> Callable[..., torch.Tensor]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            if x.numel() != len(self._rows) * x.shape[-1]:
                raise Unmixable(f"{site[1]} in block {site[0]} is not called row by row")
            given, known = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
            if plainly:
                found = self._plainly(site, given, known)
            else:
                found = _kernel().add(given, known, self._table[index], self._ranks)
            return found.view(output.shape)

        return hook

    def _plainly(self, site: Site, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        found = output.clone()
        for row, held in enumerate(self._rows):
            adapter = None if held is None else held()
            if adapter is not None and (plain := adapter.get(site)):
                found[row] = plain.added(x[row], output[row])
        return found


def _kernel() -> Any:
    # Triton comes with torch for GPUs only.
    from swarm_notebook.server.adapters import low_rank_kernel

    return low_rank_kernel
