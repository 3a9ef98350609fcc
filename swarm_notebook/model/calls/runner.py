"""What travels while the model runs: one request per span, and hooks that cost what they must.

The model's own code calls its blocks one after another. The first block that is called asks the
whole chain for its result, and for the states at the boundaries of *observed* blocks (those with
hooks on them); each further block only hands out what came with it, **if its input is the very
tensor that was handed out before, unchanged**. Otherwise somebody changed the state in between,
and the chain is asked again from there. So reading any number of states costs no extra trip, and
each change costs one.

What an unobserved block in between hands out is nothing that anybody looks at. To be sure, it is
a tensor of NaN, which is recognised wherever it comes back, and refused.

A request ends where the `layout` says that true states are needed: before a block at home, before
whatever else stands in the list of blocks, and where that list ends.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from swarm_notebook.checkpoint.states import input_state, with_input_state
from swarm_notebook.client.connection import Connection
from swarm_notebook.client.request import Outputs
from swarm_notebook.client.session.session import Given
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.adapters.injected import Adapters
from swarm_notebook.model.blocks.blanks import blank
from swarm_notebook.model.blocks.hooks import deliver
from swarm_notebook.model.blocks.intact import dropouts
from swarm_notebook.model.blocks.layout import Layout
from swarm_notebook.model.blocks.remote import OwnBlock
from swarm_notebook.model.blocks.same import SameTensor
from swarm_notebook.model.calls import inputs
from swarm_notebook.model.calls.autograd import Segment
from swarm_notebook.model.calls.call import Call
from swarm_notebook.model.calls.decoder import DecoderCalls
from swarm_notebook.model.calls.given import (
    refuse_blank,
    refuse_changed,
    refuse_other_kinds,
    refuse_others,
)
from swarm_notebook.model.calls.requests import detached, pass_of, request_alone, request_of
from swarm_notebook.model.calls.tracing import BlockTrace
from swarm_notebook.model.generation.cache import RemoteCache


class Runner:
    """Runs the remote blocks of one model. Calls of different threads do not mix.

    Attributes:
        calls: the runs of the decoder.
        deep_prompts: trainable vectors ``[blocks, length, hidden]`` that are added to the first
            positions of each block's input, or None.
    """

    calls: DecoderCalls
    returns_tuple: bool

    def __init__(self, calls: DecoderCalls, *, returns_tuple: bool):
        self.calls, self.returns_tuple = calls, returns_tuple
        self.connection: Connection = calls.connection
        self.deep_prompts: torch.Tensor | None = None
        self._told = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        """A copy of the model is another view on the same servers, with hooks of its own."""
        memo[id(self)] = twin = object.__new__(Runner)
        twin.__dict__.update(self.__dict__)
        twin.calls = copy.deepcopy(self.calls, memo)
        return twin

    def __reduce__(self) -> Any:
        raise Unsupported(
            "a remote model is a live connection and cannot be pickled; save its adapter with "
            "save_pretrained, or connect again where you need it"
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks of the model, wherever they run."""
        return self.calls.blocks

    @property
    def adapters(self) -> Adapters:
        """What PEFT put into them."""
        return self.calls.adapters

    @property
    def home(self) -> frozenset[int]:
        """The blocks that run in the notebook."""
        return self.calls.home

    @property
    def generating(self) -> RemoteCache | None:
        """The cache that ``generate`` uses in this thread, if it still lives."""
        held = self.calls.here.generating
        return None if held is None else held()

    @generating.setter
    def generating(self, cache: RemoteCache) -> None:
        self.calls.here.generating = weakref.ref(cache)

    def warn_of_dropout(self) -> None:
        """Say once that the remote blocks drop nothing, where those of a local model would."""
        remote = (block for index, block in enumerate(self.blocks) if index not in self.home)
        found = next((name for block in remote for name in dropouts(block)), None)
        if found is None or self._told:
            return
        self._told = True
        warnings.warn(
            f"dropout inside of remote blocks ({found}) is not applied in training: servers keep "
            "their blocks as for evaluation. Use an adapter's own dropout, or bring the blocks "
            "home: swarm.own(slice(None))",
            stacklevel=3,
        )

    def home_changed(self) -> None:
        """Look again at which blocks are at home."""
        self.calls.home = frozenset(
            index for index, block in enumerate(self.blocks) if isinstance(block, OwnBlock)
        )
        self.adapters.forget()

    def given(self, named: dict[str, Any]) -> None:
        """What a block is called with, before its hooks see it."""
        self.calls.here.given = named

    def run(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The output of block ``index``; the network is asked only when it must be."""
        refuse_other_kinds(index, hidden)
        if inputs.without_values(hidden):
            return torch.empty_like(hidden)
        call = self.calls.here.call
        if call is None:
            return self._run_alone(index, hidden, kwargs)
        given, self.calls.here.given = self.calls.here.given, None
        if given is not None:
            refuse_changed(index, given, kwargs)
        refuse_others(index, call, kwargs, self.calls.rotations)
        before = call.place
        place = call.arrive(index)
        late = not call.shortened and self.calls.look_again(call, index)
        if call.continues(index, hidden) and not late:
            if call.piece == index:
                # The same values, but perhaps wrapped anew: the graph must follow the wrapping.
                call.piece_input = hidden
        else:
            refuse_blank(index, hidden, late=late)
            hidden = inputs.promoted(hidden, self.blocks[index])
            self._fetch(call, index, hidden, before, place)
        for name, module in call.inside.get(index, ()):
            inner = self._inner(call, index, name)
            record = (index, name) in call.recorded
            deliver(f"block {index}.{name}", module, inner, self.calls.recorded, record=record)
        self._serve_trace(call, index, hidden, place)
        return self._hand_out(call, index, hidden)

    def _inner(self, call: Call, index: int, name: str) -> torch.Tensor:
        """The output of a module inside of a block, as it came."""
        inner = call.outputs.inner[index, name]
        if call.segment is None:
            return inner
        return call.segment.watch(index, f"block {index}.{name}", inner)

    def _serve_trace(self, call: Call, index: int, hidden: torch.Tensor, place: int | None) -> None:
        """Give a trace of nnsight what it waits for inside of a block, one trip for each wish."""
        trace = BlockTrace.of(self.blocks[index])
        if trace is None:
            return
        while wanted := trace.asked():
            if any((index, name) not in call.outputs.inner for name, _ in wanted):
                call.inside[index] = [*call.inside.get(index, ()), *wanted]
                self._fetch(call, index, hidden, call.place, place)
            for name, module in wanted:
                inner = self._inner(call, index, name)
                full = f"block {index}.{name}"
                trace.serve(name, self.calls.recorded.shaped(full, module, inner))
        trace.pass_by()

    def run_own(
        self, index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What block ``index``, which is at home, makes of its arguments by ``forward``."""
        hidden = input_state(args, kwargs)
        call = self.calls.here.call
        if call is None or inputs.without_values(hidden):
            return forward(*args, **kwargs)
        call.arrive(index)
        refuse_blank(index, hidden)
        cache = call.cache
        if cache is not None:
            if call.position and torch.is_grad_enabled() and _learns(self.blocks[index], hidden):
                raise Unsupported(_NO_CACHED_GRADIENTS)
            self._remember(call, cache, index, hidden)
        prompts = self.deep_prompts
        if prompts is not None and call.position < prompts.shape[1]:
            own = prompts[index, call.position : call.position + hidden.shape[1]].to(hidden)
            prompted = torch.cat([hidden[:, : len(own)] + own, hidden[:, len(own) :]], dim=1)
            args, kwargs = with_input_state(args, kwargs, prompted)
        output = forward(*args, **kwargs)
        call.following, call.expected, call.end, call.blank = index + 1, None, index + 1, False
        call.outputs, call.segment = Outputs({}, {}), None
        return output

    def _hand_out(self, call: Call, index: int, like: torch.Tensor) -> torch.Tensor:
        """The output of block ``index``, or a blank if it is not observed."""
        if call.shortened:
            index = call.end - 1  # all the others come with this one
        output = call.outputs.states.pop(index, None)
        call.blank = output is None
        if output is None:
            output = blank(like)
        elif call.segment is not None and call.piece_input is not None:
            prompts = self._prompts(call.piece, index + 1)
            output = call.segment.node(call.piece, index + 1, call.piece_input, prompts, output)
            call.piece, call.piece_input = index + 1, output
        call.following = index + 1
        call.expected = SameTensor(output, closely=index in call.hooked)
        return output

    def _prompts(self, start: int, end: int) -> torch.Tensor | None:
        prompts = self.deep_prompts
        return None if prompts is None else prompts[start:end, None]

    def _wants_gradients(self, hidden: torch.Tensor) -> bool:
        prompts = self.deep_prompts
        return torch.is_grad_enabled() and (
            hidden.requires_grad
            or self.adapters.trains
            or (prompts is not None and prompts.requires_grad)
        )

    def _fetch(
        self, call: Call, index: int, hidden: torch.Tensor, before: int, place: int | None
    ) -> None:
        """Ask the chain from block ``index`` on.

        Args:
            before, place: the calls that had come, and the place of this one if it was planned.
        """
        gradients = self._wants_gradients(hidden)
        cache = call.cache
        if cache is not None and call.position and gradients:
            raise Unsupported(_NO_CACHED_GRADIENTS)
        stateless = cache is None or (call.position == 0 and (cache.lazy or gradients))
        if not stateless:
            call.refuse_detours(index, before, place)
            if call.adapter is not None and "alora_offsets" in call.adapter.by_row:
                raise Unsupported(_ALORA)
        call.end = index + 1 if place is None else call.layout.stretch_end(place)
        if not stateless:
            call.end_before_edits(index)
        length = self.calls.rotations.length(call.last)
        request = request_of(call, index, hidden, self._prompts(index, call.end), length)
        if stateless and not call.packs and request.position_ids is not None:
            # Without a cache and a mask a server would find sequences packed in one row.
            ones = torch.ones(call.rows, call.new, dtype=torch.uint8)
            request.mask = ones if request.mask is None else request.mask
        if cache is not None:
            self._remember(call, cache, index, request.hidden)
        call.segment = None
        if cache is None or stateless:
            call.outputs, trails = self.connection.forward(request, keep=gradients)
            if gradients:
                weights = self.adapters.parameters if call.adapter else {}
                call.segment = Segment(self.connection, request, trails, weights)
                call.piece, call.piece_input = index, hidden
        else:
            states, inner = request.states, request.inner
            last = call.kept if call.end == len(self.blocks) else None
            call.outputs = self.connection.step(
                cache.session, index, call.end, states, inner, last=last
            )
        received = call.outputs.states
        # CUDA has taken memory that is not pinned when it returns, and what comes next is launched
        # while it copies.
        no_wait = hidden.device.type == "cuda"
        with torch.inference_mode(False):
            for block, state in received.items():
                state = state.to(hidden.device, non_blocking=no_wait)
                received[block] = self.calls.kept.fill_up(state, call.new)

    def _remember(self, call: Call, cache: RemoteCache, index: int, hidden: torch.Tensor) -> None:
        """Note the input of a block in the session's history, from which caches are rebuilt."""
        session = cache.session
        if call.begun:
            if index not in self.home:
                session.edit(index, hidden)
            return
        call.begun = True
        new = pass_of(call, index, hidden, self.calls.rotations.length(call.last))
        absent = call.layout.absent(len(self.blocks))
        prompts = detached(self._prompts(0, len(self.blocks)), hidden.dtype)
        session.begin(new, Given(call.adapter, prompts, absent))

    def _run_alone(self, index: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """A block that is called by itself, outside of the model's own forward."""
        hidden = inputs.promoted(hidden, self.blocks[index])
        alone = Layout((index,), self.home, frozenset({0, 1}))
        self.calls.observer.check_intact(alone, thorough=True)
        request = request_alone(index, hidden, kwargs, self.calls.rotations)
        request.adapter = self.adapters.current(self.blocks, thorough=True)
        gradients = self._wants_gradients(hidden)
        outputs, trails = self.connection.forward(request, keep=gradients)
        output = outputs.states[index].to(hidden.device)
        if not gradients:
            return output
        weights = self.adapters.parameters if request.adapter else {}
        segment = Segment(self.connection, request, trails, weights)
        return segment.node(index, index + 1, hidden, None, output)


_ALORA = (
    "aLoRA with cached keys and values: servers take a prompt in pieces, and it counts tokens from "
    "the end; pass use_cache=False, or bring the blocks home: swarm.own(slice(None))"
)
_NO_CACHED_GRADIENTS = (
    "gradients through cached keys and values: call the model without past_key_values, or under "
    "torch.no_grad()"
)


def _learns(block: nn.Module, hidden: torch.Tensor) -> bool:
    return hidden.requires_grad or any(one.requires_grad for one in block.parameters())
