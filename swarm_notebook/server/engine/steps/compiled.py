"""Blocks that torch has compiled, for the steps that CUDA graphs launch.

A graph launches the kernels of a block at once, but they stay as many: norms, rotations and
activations read and write what they share. Compiled they are fewer.

Torch's compiler patches modules for all threads of its process while it traces, so it runs in a
process of its own (`main`), and nobody waits for it: `steps.decode` goes on with
graphs of the blocks as they are, takes the compiled ones when they are there, and only if they give
the same for the states of a real step.

What attention needs besides a block's own input does not go through its arguments (see
`attention.paged`), so blocks that are alike share what was compiled, for all lengths; every number
of rows has its own. Torch keeps on disk what it has compiled, so the next start takes less.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from swarm_notebook.server.engine.attention.paged import Seen, StepCache, at_block
from swarm_notebook.server.engine.products import few_bits
from swarm_notebook.server.engine.span import Span
from swarm_notebook.stdin import at_end_of_stdin

logger: logging.Logger = logging.getLogger(__name__)

# A block takes seconds to compile; no kind of block was seen to take a minute.
COMPILE_SECONDS = 600.0


class CannotCompile(Exception):
    """What a block does cannot be compiled, or has not been; the text says why."""


@dataclass(frozen=True)
class FromStep:
    """A step's part in an argument of a block: its cache or its mask."""

    cache: bool


@dataclass
class _Job:
    """One kind of block to compile, for one number of rows.

    Attributes:
        layer: without memory.
        inputs, named: its arguments; tensors have no memory, and `FromStep` stands for others.
    """

    layer: nn.Module
    inputs: tuple[Any, ...]
    named: dict[str, Any]
    device: torch.device


@dataclass
class _Compiled:
    """What a job came to.

    Attributes:
        function: gets the weights in the order of their names, then the tensors of the arguments.
        constants: the arguments that are no tensors, which it was compiled for.
        outputs: how its tensors become what the block returns.
    """

    function: Callable[..., Any]
    constants: list[Any]
    outputs: pytree.TreeSpec


# A block, and the arguments of a call of it.
_Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Compiler:
    """Has the blocks of a span compiled, beside their use.

    Args:
        span: modules of its own that attend by `attention.paged`; they are changed.
        compile_jobs: gives the functions for some jobs; in a thread of its own.

    Attributes:
        why_not: why nothing is compiled any more; empty as long as all is well.
    """

    why_not: str

    def __init__(
        self,
        span: Span,
        compile_jobs: Callable[[list[_Job]], list[_Compiled]] | None = None,
    ):
        self.span = span
        self._compile_jobs = compile_jobs or compile_elsewhere
        self._jobs: SimpleQueue[dict[tuple[Hashable, int], _Job]] = SimpleQueue()
        # What steps of some blocks and rows need, by kind of block and number of rows.
        self._needed: dict[tuple[tuple[int, int], int], set[tuple[Hashable, int]]] = {}
        self._asked: set[tuple[Hashable, int]] = set()
        self._compiled: dict[tuple[Hashable, int], _Compiled] = {}
        self._thread: threading.Thread | None = None
        self.why_not = ""
        for index, layer in enumerate(span.layers):
            vars(layer)["forward"] = self._caller(layer, span.start + index)

    def ready(self, blocks: tuple[int, int], rows: int) -> bool:
        """Whether `span` can take steps of some blocks, of so many rows."""
        needed = self._needed.get((blocks, rows))
        return not self.why_not and needed is not None and needed <= self._compiled.keys()

    @contextmanager
    def watching(self, span: Span, blocks: tuple[int, int], rows: int) -> Iterator[None]:
        """Have compiled what a step runs meanwhile through a span like the own one."""
        if (blocks, rows) in self._needed or self.why_not:
            yield
            return
        calls: dict[tuple[Hashable, int], _Call] = {}
        with ExitStack() as hooks:
            for layer, own in zip(span.layers, self.span.layers, strict=True):
                note = _noting(calls, own, rows)
                hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            yield
        if not calls:
            return  # a graph was launched
        self._needed[blocks, rows] = set(calls)
        new = calls.keys() - self._asked
        self._asked |= new
        try:
            jobs = {key: _job(*calls[key], span.device) for key in calls if key in new}
        except Exception as error:  # whatever a block holds that cannot be copied
            self.give_up(error)
            return
        if not jobs:
            return
        self._jobs.put(jobs)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="compile", daemon=True)
            self._thread.start()

    def give_up(self, error: Exception) -> None:
        """Compile nothing more, and use nothing of it."""
        self.why_not = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.info("blocks are not compiled: %s", self.why_not)

    def _work(self) -> None:
        while not self.why_not:
            jobs = self._jobs.get()
            # A process takes as long to start as a block to compile: one for all that is asked.
            while not self._jobs.empty():
                jobs |= self._jobs.get()
            began = time.monotonic()
            try:
                found = self._compile_jobs(list(jobs.values()))
            except Exception as error:  # whatever a compiler does with what it does not expect
                self.give_up(error)
                return
            self._compiled |= dict(zip(jobs, found, strict=True))
            took = time.monotonic() - began
            rows = sorted({rows for _, rows in jobs})
            logger.info("compiled %d kinds of blocks for %s rows in %.1f s", len(jobs), rows, took)

    def _caller(self, layer: nn.Module, block: int) -> Callable[..., Any]:
        kind, weights = _kind(layer), list(_weights(layer).values())

        def call(*inputs: Any, **named: Any) -> Any:
            leaves = pytree.tree_leaves((inputs, named))
            (seen,) = [leaf for leaf in leaves if isinstance(leaf, Seen)]
            at_block(block, seen)
            tensors, constants = _parted(leaves)
            compiled = self._compiled[kind, tensors[0].shape[0]]
            if constants != compiled.constants:
                raise CannotCompile(f"block {block} was compiled for other arguments")
            outputs = compiled.function(*weights, *tensors)
            return pytree.tree_unflatten(list(outputs), compiled.outputs)

        return call


def _kind(layer: nn.Module) -> Hashable:
    """The same for blocks that one function can stand for: all but their weights is alike."""
    weights = [(name, w.shape, w.dtype, w.stride()) for name, w in _weights(layer).items()]
    settings = [
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if key != "layer_idx" and isinstance(value, (bool, int, float, str))
    ]
    return repr((layer, weights, settings))


def _weights(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What a block computes with: parameters and buffers, packed weights as their bits."""
    whole = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    bits = few_bits.bits_of(layer)
    for name in {name.rpartition(".")[0] for name in bits}:
        del whole[name]
    return {**whole, **bits}


def _parted(leaves: Sequence[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """The tensors among some arguments, and all others."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    others = [_given(leaf) for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    return tensors, others


def _given(leaf: Any) -> Any:
    if isinstance(leaf, (Seen, StepCache)):
        return FromStep(isinstance(leaf, StepCache))
    return leaf


def _noting(
    calls: dict[tuple[Hashable, int], _Call], own: nn.Module, rows: int
) -> Callable[..., None]:
    """A hook that notes the first call of each kind of block; its own is like ``own``."""

    def note(_layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.setdefault((_kind(own), rows), (own, inputs, named))

    return note


def _job(
    layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], device: torch.device
) -> _Job:
    """What a call of a block needs to be compiled."""
    if not few_bits.multiplies_all(layer):
        raise CannotCompile("some weights are packed that no linear layer has")
    weights = [*layer.parameters(), *_weights(layer).values()]
    empty = {id(weight): _without_memory(weight) for weight in weights}
    bare = copy.deepcopy(layer, empty)
    del vars(bare)["forward"]
    inputs, named = pytree.tree_map(_without_memory, (inputs, named))
    return _Job(bare, inputs, named, device)


def _without_memory(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return _given(leaf)
    # Not by `empty_like`, for which a packed weight is unpacked.
    empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(leaf, nn.Parameter) else empty


def traced(job: _Job) -> tuple[torch.fx.GraphModule, list[torch.Tensor], list[Any], Any]:
    """A block as a graph of operators; its inputs, constants and the structure of its outputs."""
    from torch.fx.experimental.proxy_tensor import make_fx

    names = list(_weights(job.layer))
    leaves, structure = pytree.tree_flatten((job.inputs, job.named))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    constants = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
    found: list[Any] = []

    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        filled = [_stand_in(leaf) if isinstance(leaf, FromStep) else leaf for leaf in leaves]
        for place, tensor in zip(places, given[len(names) :], strict=True):
            filled[place] = tensor
        inputs, named = pytree.tree_unflatten(filled, structure)
        weights = dict(zip(names, given, strict=False))
        with few_bits.with_bits(job.layer, weights) as rest:
            output = torch.func.functional_call(job.layer, rest, inputs, named)
        outputs, spec = pytree.tree_flatten(output)
        if not all(isinstance(one, torch.Tensor) for one in outputs):
            raise CannotCompile("a block returns something else than tensors")
        found[:] = [spec]
        return outputs

    tensors = [
        torch.empty_like(one, device=job.device)
        for one in (*_weights(job.layer).values(), *(leaves[place] for place in places))
    ]
    with torch.no_grad():
        graph = make_fx(run, tracing_mode="fake")(*tensors)
    return graph, tensors, constants, found[0]


def _stand_in(leaf: FromStep) -> Any:
    return _Noted() if leaf.cache else Seen(torch.empty(0))


class _Noted(StepCache):
    """A step's cache while a block is traced: attention stands for all that it does."""

    def __init__(self) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def compile_elsewhere(jobs: list[_Job]) -> list[_Compiled]:
    """Have a process of its own compile, and load what it leaves."""
    with tempfile.TemporaryDirectory(prefix="swarm-notebook-") as folder:
        todo = Path(folder) / "jobs"
        todo.write_bytes(pickle.dumps(jobs))
        command = [sys.executable, "-c", f"import {__name__} as it; it.main()", folder]
        said = Path(folder) / "said"
        with said.open("w") as output:
            # It ends when this process does, for then its standard input does.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
            try:
                status = process.wait(COMPILE_SECONDS)
            finally:
                process.kill()
                process.communicate()
        if status:
            lines = said.read_text(errors="replace").strip().splitlines()
            raise CannotCompile(lines[-1] if lines else f"exit status {status}")
        return [_load(Path(folder), index) for index in range(len(jobs))]


def import_ahead() -> None:
    """Import what `_load` needs, which is three quarters of its time, before anybody is served."""
    with suppress(ImportError):  # of another torch: then whoever loads says so, or imports it
        from torch._functorch._aot_autograd import autograd_cache  # noqa: F401
        from torch._inductor import compile_fx  # noqa: F401
        from torch._inductor.codecache import torch_key

        torch_key()  # a digest of torch's own sources, which is kept


def _load(folder: Path, index: int) -> _Compiled:
    from torch._inductor.standalone_compile import CompiledArtifact

    # From a folder of this process alone.
    constants, outputs = pickle.loads((folder / f"facts-{index}").read_bytes())  # noqa: S301
    function: Any = CompiledArtifact.load(path=str(folder / f"code-{index}"), format="binary")
    return _Compiled(function, constants, pytree.treespec_loads(outputs))


def main() -> None:
    """In the process that compiles."""
    from torch._inductor import standalone_compile

    folder = Path(sys.argv[1])
    at_end_of_stdin(lambda: os._exit(1))  # the parent has ended
    # Whoever is served comes first.
    os.nice(10)
    jobs = pickle.loads((folder / "jobs").read_bytes())  # noqa: S301
    for index, job in enumerate(jobs):
        graph, tensors, constants, outputs = traced(job)
        with torch.no_grad():
            artifact = standalone_compile(graph, [*tensors], dynamic_shapes="from_example_inputs")
        artifact.save(path=str(folder / f"code-{index}"), format="binary")
        (folder / f"facts-{index}").write_bytes(
            pickle.dumps((constants, pytree.treespec_dumps(outputs)))
        )
