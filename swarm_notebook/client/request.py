"""What a server is asked to compute, and the reading of its answer with suspicion.

`Request` is the common form of a step with a cache, of a forward and of a backward pass. What
goes beyond Petals' protocol is refused for servers that do not speak our additions.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.passes.call import ANSWER_SLACK
from swarm_notebook.errors import BadRequest, ServerFailed, Unsupported
from swarm_notebook.net.dht.records import ServerSpan
from swarm_notebook.net.wire import protocol, tensors
from swarm_notebook.net.wire.hand_overs import Signed
from swarm_notebook.net.wire.message import PackedTensor
from swarm_notebook.texts import clean

# A server's words in our messages and logs: a few lines.
MAX_REASON = 500
# As large as the outputs of modules inside of blocks are on any server (`server.engine.captures`).
MAX_INNER_BYTES = 512 << 20
# Bytes of a value: nobody answers in more than the notebook computes in, or float32.
_WIDEST = torch.float32.itemsize

T = TypeVar("T")


@dataclass
class Request:
    """What one server is asked to compute in one request.

    Attributes:
        hidden: ``[batch, length, hidden]``, the input of block `start`.
        position: how many tokens precede these in the server's cache.
        rows: which rows of the cache to continue, or None for all as they are.
        rows_version: how many of the session's row selections the cache has followed then.
        states: blocks of ``[start, end)`` whose outputs are wanted besides the last one's.
        prompts: deep prompts of these blocks, ``[blocks, batch or 1, length, hidden]``.
        adapter: adapters of the notebook to run the blocks with.
        inner: modules inside of blocks whose outputs are wanted, as block and dotted name.
        seed: of the dropout in adapters; None for none.
        rotary_length: the length that rotary embeddings which depend on one go by; None where
            that makes no difference.
        dtype: wire name of what a forward pass is to be computed in; None: as the server computes.
        last: how many of the last positions of the last block's output are wanted of a step; None
            for all.
    """

    start: int
    end: int
    hidden: torch.Tensor
    position: int
    rows: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    states: Sequence[int] = ()
    prompts: torch.Tensor | None = None
    adapter: Adapter | None = None
    inner: Sequence[tuple[int, str]] = ()
    seed: int | None = None
    rows_version: int = 0
    rotary_length: int | None = None
    dtype: str | None = None
    last: int | None = None

    @property
    def boundaries(self) -> list[int]:
        """The blocks whose inputs are wanted, because they are outputs of the blocks before."""
        return [block + 1 for block in self.states]

    @property
    def output_shape(self) -> list[int]:
        """That of the last block's output in the answer."""
        rows, length, hidden = self.hidden.shape
        return [rows, length if self.last is None else min(self.last, length), hidden]

    def part(self, start: int, end: int, hidden: torch.Tensor) -> Request:
        """The share of blocks ``[start, end)`` in this request."""
        prompts = self.prompts
        return replace(
            self,
            start=start,
            end=end,
            hidden=hidden,
            states=[block for block in self.states if start <= block < end - 1],
            inner=[named for named in self.inner if start <= named[0] < end],
            prompts=None if prompts is None else prompts[start - self.start : end - self.start],
        )

    def without_tokens(self, position: int) -> Request:
        """The same for no tokens at all, at ``position``."""
        return replace(
            self,
            hidden=self.hidden[:, :0],
            position=position,
            mask=None,
            position_ids=None,
            states=(),
            inner=(),
            prompts=None,
            last=None,
        )

    def options(self) -> dict[str, Any]:
        """The metadata by which our servers know what is asked beyond Petals' protocol."""
        options: dict[str, Any] = {}
        if self.states:
            options["states"] = list(self.states)
        if self.inner:
            options["inner"] = [list(named) for named in self.inner]
        if self.adapter is not None:
            options["adapter"] = self.adapter.key()
            if self.adapter.by_row:
                options["by_row"] = dict(self.adapter.by_row)
            if self.seed is not None:
                options.update(train=True, seed=self.seed)
        if self.rotary_length is not None:
            options["rotary_length"] = self.rotary_length
        if self.dtype is not None:
            options[protocol.COMPUTE_DTYPE] = self.dtype
        if self.last is not None:
            options[protocol.LAST_POSITIONS] = self.last
        return options


def travelling(hidden: torch.Tensor, span: ServerSpan) -> torch.Tensor:
    """Hidden states as they are sent: not more exactly than the server computes."""
    half = tensors.float_dtype(span.info.torch_dtype)
    return hidden if half is None or hidden.dtype != torch.float32 else hidden.to(half)


def as_short_as_exact(hidden: torch.Tensor) -> torch.Tensor:
    """The same values in half as many bytes, if they have all been rounded so before."""
    halves = (hidden.to(half) for half in (torch.bfloat16, torch.float16))
    return next((half for half in halves if torch.equal(half.to(hidden.dtype), hidden)), hidden)


def refuse_extensions(span: ServerSpan, server: str, request: Request) -> None:
    """Against a plain Petals server, say what cannot work there (contract C6)."""
    without_cache = "pass use_cache=False"
    wanted = {
        "padding between or behind tokens in a cache": (request.mask is not None, without_cache),
        "positions that jump in a cache": (request.position_ids is not None, without_cache),
        "hooks on modules inside of blocks": (
            bool(request.inner),
            "hook whole blocks, bring the block home (swarm.own(block))",
        ),
        "rotary embeddings beyond the length that the model was made for": (
            request.rotary_length is not None,
            "shorten the prompt",
        ),
    }
    for what, (asked, instead) in wanted.items():
        if asked and not span.extended:
            raise Unsupported(
                f"{server} is a Petals server, which does not support {what}; {instead}, or use "
                "servers started with `swarm-notebook serve`"
            )


@dataclass
class Outputs:
    """What came back of a pass through some blocks.

    Attributes:
        states: outputs of blocks; that of the last block is always there, perhaps with fewer
            positions (`Request.last`).
        inner: outputs of modules inside of blocks.
    """

    states: dict[int, torch.Tensor]
    inner: dict[tuple[int, str], torch.Tensor]


def joined(parts: Sequence[Outputs], dim: int) -> Outputs:
    """The outputs of groups of rows (``dim`` 0), or of parts of a pass (1), as those of all."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return Outputs(
        {key: torch.cat([part.states[key] for part in parts], dim) for key in first.states},
        {key: torch.cat([part.inner[key] for part in parts], dim) for key in first.inner},
    )


def answer_bytes(request: Request) -> int:
    """The most bytes that an answer with what a request asks for may have."""
    hidden = request.hidden
    values = math.prod(request.output_shape) + len(request.states) * hidden.numel()
    states = values * max(hidden.itemsize, _WIDEST)
    return states + (MAX_INNER_BYTES if request.inner else 0) + ANSWER_SLACK


async def beside_loop(size: int, read: Callable[[], T]) -> T:
    """What ``read`` makes of tensors of so many bytes; in another thread if they are large."""
    if size <= tensors.INLINE_BYTES:
        return read()
    return await asyncio.to_thread(read)


def read_outputs(packed: Sequence[PackedTensor], request: Request, server: str) -> Outputs:
    """The outputs in a server's answer, in the dtype of the request.

    Raises:
        ServerFailed: the server sent something else than was asked for.
    """
    blocks = [request.end - 1, *request.states]
    if len(packed) != len(blocks) + len(request.inner):
        raise ServerFailed(
            f"{server} sent {len(packed)} tensors, not {len(blocks) + len(request.inner)}"
        )
    dtype, whole = request.hidden.dtype, list(request.hidden.shape)
    shapes = [request.output_shape, *(whole for _ in request.states)]
    outer = list(zip(packed, shapes, strict=False))
    # All shapes first: nothing is unpacked of an answer that is not what was asked for.
    layouts = [check_layout(tensor, dtype, shape, server) for tensor, shape in outer]
    layouts += [check_layout(tensor, dtype, None, server) for tensor in packed[len(blocks) :]]
    read = [
        tensors.unpack(tensor, layout).to(dtype)
        for tensor, layout in zip(packed, layouts, strict=True)
    ]
    states, inner = read[: len(blocks)], read[len(blocks) :]
    for state in states:
        check_finite(state, "hidden states", server)
    return Outputs(
        dict(zip(blocks, states, strict=True)), dict(zip(request.inner, inner, strict=True))
    )


@dataclass(slots=True)
class ServerReport:
    """What a server says along with an answer; a Petals server says nothing.

    Attributes:
        times: its seconds of serialisation, queue and compute.
        push_failed: why the next server did not get the output, or empty.
        filled: the input came from the client after all.
        print: of what the server before has pushed (`net.wire.prints`); None: it does not say.
    """

    times: tuple[float, float, float] = (0.0, 0.0, 0.0)
    push_failed: str = ""
    filled: bool = False
    print: int | None = None

    def times_within(self, waited: float) -> tuple[float, float, float]:
        """The times as a part of the seconds that were waited."""
        total = sum(self.times)
        share = 1.0 if total <= waited else waited / total
        serialisation, queue, compute = self.times
        return serialisation * share, queue * share, compute * share


def read_report(metadata: bytes) -> ServerReport:
    """What an answer's metadata say; rubbish is nothing."""
    report = ServerReport()
    try:
        found = protocol.unpack_metadata(metadata)
    except BadRequest:
        return report
    times = found.get(protocol.TIMES_KEY)
    if isinstance(times, (list, tuple)) and len(times) == 3:
        # Not NaN, and in bounds.
        parts = [part if type(part) is float and 0.0 <= part < 1e6 else 0.0 for part in times]
        report.times = (parts[0], parts[1], parts[2])
    failed = found.get(protocol.PUSH_FAILED)
    if isinstance(failed, str):
        report.push_failed = clean(failed[:MAX_REASON])
    report.filled = found.get(protocol.FILLED) is True
    printed = found.get(protocol.PRINT)
    report.print = printed if type(printed) is int else None
    return report


def read_proof(metadata: bytes) -> Signed | None:
    """What a server has to show for what was pushed to it; rubbish is nothing."""
    try:
        found = protocol.unpack_metadata(metadata).get(protocol.PROOF)
    except BadRequest:
        return None
    if not isinstance(found, (list, tuple)) or len(found) != 3:
        return None
    return Signed(*found) if all(isinstance(part, bytes) for part in found) else None


def read_tensor(
    packed: PackedTensor, dtype: torch.dtype, shape: Sequence[int] | None, server: str
) -> torch.Tensor:
    """A floating point tensor from the wire, in ``dtype``.

    Args:
        shape: what it is to have; None for any.

    Raises:
        ServerFailed: it is none, or has another shape, which is found before it is unpacked.
    """
    return tensors.unpack(packed, check_layout(packed, dtype, shape, server)).to(dtype)


def check_layout(
    packed: PackedTensor, dtype: torch.dtype, shape: Sequence[int] | None, server: str
) -> tensors.TensorLayout:
    """Refuse a tensor that is not what was asked for, without unpacking it; else its layout."""
    try:
        layout = tensors.layout(packed)
    except BadRequest as error:
        raise ServerFailed(f"{server} sent no readable tensor: {error}") from None
    if shape is not None and list(layout.shape) != list(shape):
        raise ServerFailed(
            f"{server} sent a tensor of shape {list(layout.shape)}, expected {list(shape)}"
        )
    # Nobody computes in more than the notebook, or float32, if it is not a way to take its memory.
    widest = max(dtype.itemsize, _WIDEST)
    if not layout.dtype.is_floating_point or layout.dtype.itemsize > widest:
        raise ServerFailed(f"{server} sent a {layout.dtype} tensor, expected {dtype}")
    return layout


def check_finite(tensor: torch.Tensor, what: str, server: str) -> None:
    """Refuse a tensor with NaN or infinite values."""
    if not tensors.all_finite(tensor):
        raise ServerFailed(f"{server} sent {what} with NaN or infinite values")
