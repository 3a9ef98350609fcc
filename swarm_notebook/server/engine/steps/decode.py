"""Steps of one new position, for many sessions, as fast as the card allows.

With a token or a few the time of a step goes into launching kernels. A CUDA graph launches them all
at once; it is captured for fixed shapes, so a step runs in the smallest bucket that holds it (see
`program`). Meanwhile torch compiles the blocks (`compiled`); graphs of them take over.

`Decoding.try_out` finds out whether a model can do this, by comparing what sessions get with and
without. Nothing is known by architecture. What cannot (BLOOM and Falcon do not call transformers'
attention interface, rotations that stretch look at the largest position) goes on as before, and so
does every step that is not of this kind: more than one position, prompts, modules inside of
blocks, adapters that are no plain LoRA. All of them share the sessions' caches (`kv.pages`). Rows
with plain LoRA, and those beside them, have graphs of their own (see `row_adapters`), of blocks as
they are: compiled ones know no adapters.

Measured on one H100 with 32 blocks of an 8B Llama in bfloat16 (context 512), graph and all around
it: 7.8 ms for one row, 9.0 for 8, 9.7 for 16, 10.7 for 32; products with weights take 5.3 to 5.6 of
them. Transformers' own pass for one row takes 18 to 36, as the machine's processors are.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from swarm_notebook.server.adapters.low_rank import RANKS, Additions
from swarm_notebook.server.engine.attention.batch import Part
from swarm_notebook.server.engine.attention.paged import NAME
from swarm_notebook.server.engine.kv.cache import PAGE, SessionCache
from swarm_notebook.server.engine.kv.pages import KVShape, PagedCache, PagePool
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.compiled import Compiler
from swarm_notebook.server.engine.steps.program import Bucket, Program, pages_of
from swarm_notebook.server.engine.steps.session_state import BatchItem, run_one
from swarm_notebook.server.engine.steps.trial import TrialSession, is_close, trial_sessions

logger: logging.Logger = logging.getLogger(__name__)

# As many tokens as a batch takes (`scheduler.BATCH_TOKENS`), each a row.
MAX_ROWS = 256
# The shortest bucket: reading what is not there costs little below it, and each is captured once.
SHORTEST = 256
MAX_BUCKETS = 64

# The first one is computed as it comes, the others by its graph.
_TRIAL_STEPS = 3


class Impossible(Exception):
    """These blocks cannot take their steps this way; the text says why."""


class Decoding:
    """Steps of one position through the blocks of a span.

    Args:
        host: the blocks as all other requests run them.
        span: the same blocks around the same weights, attending by `attention.paged`.
        capture: in CUDA graphs.
        fused: attend by `attention.kernel`.
        shortest: positions of the shortest bucket.
        rows: of every bucket; None: as a step needs.

    Attributes:
        compiled: blocks and numbers of rows whose steps run through compiled blocks.
    """

    pool: PagePool
    hidden_size: int

    def __init__(
        self,
        host: Span,
        span: Span,
        pool: PagePool,
        hidden_size: int,
        *,
        capture: bool,
        fused: bool = False,
        shortest: int = SHORTEST,
        rows: int | None = None,
    ):
        self.pool, self.hidden_size = pool, hidden_size
        self._host, self._span, self._capture, self._fused = host, span, capture, fused
        self._shortest, self._rows = shortest, rows
        self._programs: OrderedDict[Bucket, Program] = OrderedDict()
        self._graphs = torch.cuda.graph_pool_handle() if capture else None
        self._broken = ""
        self._no_adapters = ""
        # Of the adapters so far: their graphs serve all, and are captured again for new ones only.
        self._tuned: frozenset[str] = frozenset()
        self._compiler: Compiler | None = None
        self.compiled: set[tuple[tuple[int, int], int]] = set()
        # Chunks are counted from a row's first token, which only the model's own mask knows.
        self._takes_padding = "chunked_attention" not in (
            getattr(span.config, "layer_types", None) or ()
        )

    @property
    def engine(self) -> str:
        """How steps run, for people."""
        if self._broken:
            return f"plain: {self._broken}"
        return self._how + (f"; adapters plain: {self._no_adapters}" if self._no_adapters else "")

    @property
    def _how(self) -> str:
        if self._compiler is not None and self._compiler.why_not:
            how = "compiled, but not for all" if self.compiled else "graph, not compiled"
            return f"{how}: {self._compiler.why_not}"
        if self.compiled:
            return "compiled"
        return "graph" if self._capture else "plain: without a card there are no graphs"

    def compile_beside(self, **options: Any) -> None:
        """Have the blocks compiled, for the numbers of rows that steps have (see `compiled`).

        Args:
            options: of `Compiler`.
        """
        self._compiler = Compiler(paged_span(self._host), **options)
        # Somebody's first step has one row: what it needs is compiled before it comes.
        bucket = Bucket((self._span.start, self._span.end), 1, self._length(1), padded=False)
        with torch.inference_mode():
            self._run(self._program(bucket), 1, [self._span.end - 1])

    def give_up(self, error: Exception, *, adapted: bool) -> None:
        """Take no more steps: one has failed in a way that is no session's fault.

        Args:
            adapted: it had an adapter, so that only those with one are concerned.
        """
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if adapted:
            self._no_adapters = reason
        else:
            self._broken = reason
        self.drop_graphs()

    def takes(self, item: BatchItem) -> bool:
        """Whether a step is of the kind that runs here, as it stands."""
        step = item.step
        return (
            not self._broken
            and step.length == 1
            and step.rows <= (self._rows or MAX_ROWS)
            and step.mixes(item.position)
            and isinstance(item.state.cache, PagedCache)
            and (self._takes_padding or not item.state.padded_by(step))
            and self._takes_adapter(item.state.span_for(step))
        )

    def _takes_adapter(self, span: Span) -> bool:
        if span is self._host:
            return True
        return span.host is self._host and span.additions is not None and not self._no_adapters

    def calls(self, items: Sequence[BatchItem]) -> list[list[int]]:
        """Which of some steps go into one call, by their places.

        All, unless buckets have a fixed number of rows: then those alone that would have the same
        bucket without the others.
        """
        if self._rows is None:
            return [list(range(len(items)))] if items else []
        found: list[list[int]] = []
        latest: dict[tuple[int, bool], tuple[list[int], int]] = {}
        for index, item in enumerate(items):
            kind = self._length(item.position + 1), item.state.padded_by(item.step)
            call, taken = latest.get(kind, ([], self._rows))
            if taken + item.step.rows > self._rows:
                call, taken = [], 0
                found.append(call)
            call.append(index)
            latest[kind] = call, taken + item.step.rows
        return found

    def cache(self) -> SessionCache:
        """A new session's cache."""
        return PagedCache(self.pool)

    @torch.inference_mode()
    def run(self, items: Sequence[BatchItem], parts: Sequence[Part]) -> list[list[torch.Tensor]]:
        """The outputs of steps that `takes` takes and `SessionState.batch_part` has prepared.

        All are for the same blocks and have `MAX_ROWS` rows at most. The outputs are on the CPU.

        Raises:
            CacheFull: there are no pages left.
        """
        blocks = items[0].step.blocks
        rows = sum(part.rows for part in parts)
        length = 1 + max(item.position for item in items)
        padded = any(part.padding is not None for part in parts)
        adapters = [part.additions for part in parts if part.additions is not None]
        bucket = Bucket(
            blocks,
            self._rows or _power(rows),
            self._length(length),
            padded,
            self._tuned_by(adapters),
            max((max(RANKS, _power(adapter.rank)) for adapter in adapters), default=0),
        )
        program = self._program(bucket)
        program.fill(items, parts)
        states = sorted({index for item in items for index in item.step.states})
        outputs = self._run(program, rows, [blocks[1] - 1, *states])
        for item in items:
            pages_of(item).advance(*blocks, item.position + 1)
        counts = [part.rows for part in parts]
        last, *others = (output.split(counts) for output in outputs)
        found = dict(zip(states, others, strict=True))
        return [
            [last[n], *(found[index][n] for index in item.step.states)]
            for n, item in enumerate(items)
        ]

    def _tuned_by(self, adapters: Sequence[Additions]) -> frozenset[str]:
        """What a graph has to know for the adapters of a step."""
        self._tuned = self._tuned.union(*(adapter.names for adapter in adapters))
        return self._tuned if adapters else frozenset()

    def _run(self, program: Program, rows: int, blocks: Sequence[int]) -> list[torch.Tensor]:
        """The outputs of some blocks; graphs, and compiled blocks, take over where they can."""
        compiler, settled, bucket = self._compiler, program.settled, program.bucket
        if compiler is None or program.span is compiler.span or bucket.tuned:
            outputs = program.run(rows, blocks)
        else:
            with compiler.watching(program.span, bucket.blocks, bucket.rows):
                outputs = program.run(rows, blocks)
            if settled and compiler.ready(bucket.blocks, bucket.rows):
                self._improve(compiler, program, rows)
        if not settled:
            if bucket.tuned:
                self._check(program.like(program, rows, plainly=True), "adapters")
            program.capture()
        return outputs

    def _check(self, difference: float, how: str) -> None:
        if not is_close(difference, self._host.dtype):
            raise Impossible(f"{how}: results differ by {difference:.1e}")

    def _improve(self, compiler: Compiler, program: Program, rows: int) -> None:
        """Take compiled blocks for a bucket, if they give what its graph has just given."""
        better = self._new_program(program.bucket, compiler.span)
        try:
            self._check(better.like(program, rows), "compiled")
            better.capture()
        except Exception as error:  # the step itself is done, and its session goes on
            compiler.give_up(error)
        else:
            self._programs[program.bucket] = better
            self.compiled.add((program.bucket.blocks, program.bucket.rows))

    def _new_program(self, bucket: Bucket, span: Span) -> Program:
        return Program(bucket, span, self.pool, self.hidden_size, self._graphs, fused=self._fused)

    def drop_graphs(self) -> None:
        """Give up what was captured, and its memory."""
        self._programs.clear()
        self.compiled.clear()

    def _length(self, needed: int) -> int:
        return max(self._shortest, -(-_power(needed) // PAGE) * PAGE)

    def _program(self, bucket: Bucket) -> Program:
        program = self._programs.get(bucket)
        if program is None:
            program = self._new_program(bucket, self._span)
            self._programs[bucket] = program
            if len(self._programs) > MAX_BUCKETS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(bucket)
        return program

    @classmethod
    def try_out(
        cls,
        span: Span,
        hidden_size: int,
        tokens: int,
        *,
        capture: bool,
        shortest: int = SHORTEST,
        rows: int | None = None,
    ) -> Decoding:
        """Steps for these blocks, which have been compared with those of sessions alone.

        Args:
            tokens: how many cache tokens the sessions may have.

        Raises:
            Impossible: with the reason.
            torch.OutOfMemoryError: the card has no room for so many tokens.
        """
        if not span.takes_positions:
            raise Impossible("the model takes no positions")
        if kinds := span.stretching:
            raise Impossible(f"rotations of the kind {min(kinds)} depend on the longest sequence")
        alone = _rounds(trial_sessions(span, hidden_size, _TRIAL_STEPS))
        with torch.inference_mode(False):
            pool = PagePool(
                span.start,
                _shapes(alone[0][0].state.cache),
                tokens,
                dtype=span.dtype,
                device=span.device,
            )
        paged = paged_span(span)
        for fused in (True, False) if span.device.type == "cuda" else (False,):
            found = cls(
                span,
                paged,
                pool,
                hidden_size,
                capture=capture,
                fused=fused,
                shortest=shortest,
                rows=rows,
            )
            try:
                found._compare(alone)
            except Impossible as error:
                if not fused:
                    raise
                logger.info("attention runs without a kernel of its own: %s", error)
                found.drop_graphs()
            else:
                break
        return found

    def _compare(self, alone: list[list[BatchItem]]) -> None:
        """Refuse if sessions get something else here than alone, whose steps are given.

        Raises: as `try_out`.
        """
        span = self._host
        together = _rounds(trial_sessions(span, self.hidden_size, _TRIAL_STEPS, self.cache))
        try:
            for theirs, ours in zip(alone, together, strict=True):
                for item in theirs:
                    item.state.cache.truncate(*item.step.blocks, item.position)
                expected = [run_one(item)[0] for item in theirs]
                got = self.run(
                    ours, [item.state.batch_part(item.step, item.position) for item in ours]
                )
                for one, (other,) in zip(expected, got, strict=True):
                    difference = (other - one.cpu()).float().norm() / one.float().norm().cpu()
                    self._check(float(difference), "steps")
        except (Impossible, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a decoder does with what it does not expect
            raise Impossible(f"{type(error).__name__}: {error}") from error
        finally:
            for item in together[0]:
                item.state.cache.release()


def paged_span(span: Span) -> Span:
    """The same blocks around the same weights, with `attention.paged` for their attention."""
    decoder = span.cloned_decoder()
    for module in decoder.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                # Not through the property, which goes through all sub-configs.
                value._attn_implementation_internal = NAME
    choose = getattr(decoder, "set_experts_implementation", None)
    if choose is not None:
        try:
            # "grouped_mm", the usual one, asks the CPU how many tokens each expert has.
            choose("batched_mm")
        except Exception as error:  # of a model whose experts know no other
            logger.debug("experts stay as they are: %s", error)
    return Span(decoder, span.layers_name, span.start)


def _rounds(sessions: Sequence[TrialSession]) -> list[list[BatchItem]]:
    """Their steps of one position, one after the other."""
    return [
        [one.item(index, index + 1, masked=False) for one in sessions]
        for index in range(_TRIAL_STEPS)
    ]


def _shapes(cache: SessionCache) -> list[KVShape]:
    return [
        KVShape(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in cache.stores()
    ]


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
