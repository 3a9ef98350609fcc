"""One step through some blocks in fixed shapes, which a CUDA graph launches at once.

With a token or a few the time of a step goes into launching kernels: thousands of them, each over
before the next one is launched. A graph is captured for a *bucket*: a number of rows and of
positions (and the blocks that are asked for), with rows that are nobody's in what a step leaves
free. What changes from step to step, the rows' pages and positions, goes into tensors that the
graph reads.

A bucket's first step runs without a graph, which is then captured. The outputs of all blocks are in
the graph's own memory, so states of any block cost nothing but the way to the client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from swarm_notebook.server.engine.attention.batch import Part
from swarm_notebook.server.engine.attention.paged import StepCache, stepping
from swarm_notebook.server.engine.kv.cache import PAGE
from swarm_notebook.server.engine.kv.pages import NOWHERE, PagedCache, PagePool
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.row_adapters import RowAdapters
from swarm_notebook.server.engine.steps.session_state import BatchItem

# Columns of a plan before the pages of a row.
_POSITION, _POSITION_ID, _NEW, _PAGES = range(4)


@dataclass(frozen=True)
class Bucket:
    """What a captured step is made for.

    Attributes:
        blocks: ``[start, end)``.
        padded: whether rows may have padding.
        tuned: names of the modules that rows' adapters may tune; none: no row has an adapter.
        ranks: of the adapters, at most.
    """

    blocks: tuple[int, int]
    rows: int
    length: int
    padded: bool
    tuned: frozenset[str] = frozenset()
    ranks: int = 0


class Program:
    """A step in one bucket: its inputs, where they stay, and its graph once it is captured.

    Args:
        graphs: the memory of captured steps; None: none is captured.
        fused: attend by `attention.kernel`.
    """

    bucket: Bucket
    span: Span
    plan: torch.Tensor
    padding: torch.Tensor | None
    hidden: torch.Tensor

    def __init__(
        self,
        bucket: Bucket,
        span: Span,
        pool: PagePool,
        hidden_size: int,
        graphs: Any,
        *,
        fused: bool = False,
    ):
        self.bucket, self.span, self._pool, self._graphs = bucket, span, pool, graphs
        self._fused = fused
        rows, on_card = bucket.rows, span.device.type == "cuda"
        with torch.inference_mode(False):
            plan = torch.zeros(rows, _PAGES + bucket.length // PAGE, dtype=torch.int64)
            hidden = torch.zeros(rows, 1, hidden_size, dtype=span.dtype)
            plan[:, _NEW] = NOWHERE
            self._plan_here = plan.pin_memory() if on_card else plan
            self._hidden_here = hidden.pin_memory() if on_card else hidden
            self._output_here = torch.zeros_like(hidden, pin_memory=on_card)
            self.plan = self._plan_here.to(span.device)
            self.padding = None
            if bucket.padded:
                shape = rows, bucket.length
                self.padding = torch.ones(shape, dtype=torch.bool, device=span.device)
            self._adapters = None
            if bucket.tuned:
                self._adapters = RowAdapters(span, bucket.blocks, bucket.tuned, rows, bucket.ranks)
        # Made in inference mode as the outputs of blocks are: compiled blocks tell them apart.
        self.hidden = self._hidden_here.to(span.device, copy=True)
        # As numpy's: many small writes.
        self._columns = self._plan_here.numpy()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: list[torch.Tensor] = []
        self._dirty = 0

    def fill(self, items: Sequence[BatchItem], parts: Sequence[Part]) -> None:
        """Write down what the rows of a step need."""
        columns, row = self._columns, 0
        for item in items:
            cache, step, position = pages_of(item), item.step, item.position
            cache.make_room(position + 1)
            page, within = divmod(position, PAGE)
            ids = step.position_ids
            for index, pages in enumerate(cache.table):
                line = columns[row]
                line[_POSITION] = position
                line[_POSITION_ID] = position if ids is None else int(ids[index % len(ids), 0])
                line[_NEW] = pages[page] * PAGE + within
                line[_PAGES : _PAGES + page + 1] = pages[: page + 1]
                row += 1
        if row < self._dirty:
            columns[row : self._dirty] = 0
            columns[row : self._dirty, _NEW] = NOWHERE
        self._dirty = row
        # As few of torch's calls as can be: in each the loop may take the interpreter's lock.
        torch.cat([item.step.hidden for item in items], out=self._hidden_here[:row])
        self._hidden_here[row:].zero_()
        if self.padding is not None:
            self.padding.fill_(True)
            row = 0
            for part in parts:
                if part.padding is not None:
                    own = part.padding
                    self.padding[row : row + part.rows, : own.shape[1]] = own.bool()
                row += part.rows
        if self._adapters is not None:
            self._adapters.fill([(part.additions, part.rows) for part in parts])

    def like(self, other: Program, rows: int, *, plainly: bool = False) -> float:
        """How far this one is from what another, which has just run, gives for the same inputs.

        Block by block, each from the other's input of it: roundings of one grow in all behind it,
        and with 40 blocks no longer tell from what is wrong.

        Args:
            rows: that are somebody's.
            plainly: with adapters computed without a kernel.

        Returns:
            the largest difference of a block's outputs beyond a rounding of them, relative to what
            the block adds to its input.
        """
        self.plan.copy_(other.plan)
        if self.padding is not None and other.padding is not None:
            self.padding.copy_(other.padding)
        inputs = [other.hidden, *other._outputs[:-1]]
        with self._stepping(plainly) as cache:
            found = [
                self._through(index, index + 1, hidden, cache)[0]
                for index, hidden in enumerate(inputs, self.bucket.blocks[0])
            ]
        differences = [
            _apart(one[:rows], theirs[:rows], given[:rows])
            for one, theirs, given in zip(found, other._outputs, inputs, strict=True)
        ]
        return float(torch.stack(differences).max())

    @property
    def settled(self) -> bool:
        """Whether it runs as it will from now on; if not, there is a graph to `capture`."""
        return self._graph is not None or self._graphs is None

    def run(self, rows: int, blocks: Sequence[int]) -> list[torch.Tensor]:
        """The outputs of some blocks for the first ``rows`` rows, on the CPU."""
        self.plan.copy_(self._plan_here, non_blocking=True)
        self.hidden.copy_(self._hidden_here, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._outputs = self.compute()
        outputs = self._outputs
        start = self.bucket.blocks[0]
        result = self._output_here
        result[:rows].copy_(outputs[blocks[0] - start][:rows], non_blocking=True)
        others = [outputs[block - start][:rows].cpu() for block in blocks[1:]]
        if self.span.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        # The next step writes over what stays here.
        return [result[:rows].clone(), *others]

    def compute(self) -> list[torch.Tensor]:
        """The output of every block from what the inputs hold."""
        start, end = self.bucket.blocks
        with self._stepping() as cache:
            states = tuple(range(start, end - 1))
            last, *others = self._through(start, end, self.hidden, cache, states=states)
        return [*others, last]

    @contextmanager
    def _stepping(self, plainly: bool = False) -> Iterator[StepCache]:
        """While the rows' next positions go through blocks."""
        table = self.plan[:, _PAGES:]
        cache = StepCache(
            self._pool,
            self._pool.spread(table),
            self.plan[:, _NEW],
            self.plan[:, _POSITION : _POSITION + 1],
            self.padding,
            table=table if self._fused else None,
        )
        with ExitStack() as stack:
            stack.enter_context(stepping(cache))
            if self._adapters is not None:
                plainly = plainly or self.span.device.type != "cuda"
                stack.enter_context(self._adapters.applied(plainly=plainly))
            yield cache

    def _through(
        self, start: int, end: int, hidden: torch.Tensor, cache: StepCache, **options: Any
    ) -> list[torch.Tensor]:
        # Compiled blocks are for strides, too, and those of the plan go by the length.
        position_ids = self.plan[:, _POSITION_ID : _POSITION_ID + 1].contiguous()
        return self.span.run(start, end, hidden, cache=cache, position_ids=position_ids, **options)

    def capture(self) -> None:
        """Have a graph launch it from now on."""
        if self._graphs is None:
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to the card meanwhile.
        with torch.cuda.graph(graph, pool=self._graphs, capture_error_mode="thread_local"):
            self._outputs = self.compute()
        self._graph = graph


def _apart(found: torch.Tensor, expected: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """How far a block's output is from what is expected, relative to what it adds to its input.

    As much as a rounding of the output does not count.
    """
    off = (found - expected).float().norm()
    off -= torch.finfo(expected.dtype).eps * expected.float().norm()
    added = (expected - given).float().norm()
    return off.clamp(min=0) / added.clamp(min=torch.finfo(added.dtype).tiny)


def pages_of(item: BatchItem) -> PagedCache:
    """Where the keys and values of a session that runs in buckets lie."""
    cache = item.state.cache
    if not isinstance(cache, PagedCache):
        raise TypeError("a session with memory of its own does not run in a bucket")
    return cache
