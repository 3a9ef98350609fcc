"""What travels while the model runs: one request per span, and hooks that cost what they must.

The model's own code calls its blocks one after another. The first block that is called asks the
whole chain for its result, and for the states at the boundaries of *observed* blocks (those with
hooks on them); each further block only hands out what came with it, **if its input is the very
tensor that was handed out before, unchanged**. Otherwise somebody changed the state in between,
and the chain is asked again from there. So reading any number of states costs no extra trip, and
each change costs one.

What an unobserved block in between hands out is nothing that anybody looks at. To be sure, it is
a tensor of NaN: a use that we overlooked shows up at once, instead of being a little wrong.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.connection import Connection
from swarm_notebook.client.request import Outputs, Request
from swarm_notebook.client.session.history import Pass
from swarm_notebook.errors import Unsupported
from swarm_notebook.model import hooks, inputs
from swarm_notebook.model.adapters import Adapters
from swarm_notebook.model.autograd import SameTensor, Segment
from swarm_notebook.model.cache import RemoteCache


@dataclass
class Call:
    """One run of the model's decoder, from its first block to its last."""

    cache: RemoteCache | None
    position: int
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    adapter: Adapter | None
    seed: int | None
    states: set[int]
    inside: dict[int, list[tuple[str, nn.Module]]]
    outputs: Outputs = field(default_factory=lambda: Outputs({}, {}))
    # The block to come, and the input that it gets if nobody changes anything.
    following: int = 0
    expected: SameTensor | None = None
    blank: torch.Tensor | None = None
    # Where gradients flow: the open piece of the segment, and its input.
    segment: Segment | None = None
    piece: int = 0
    piece_input: torch.Tensor | None = None

    def continues(self, index: int, hidden: torch.Tensor) -> bool:
        """Whether block ``index`` is called with what was handed out for it."""
        return (
            index == self.following and self.expected is not None and self.expected.matches(hidden)
        )

    def is_blank(self, hidden: torch.Tensor) -> bool:
        return self.blank is not None and hidden.data_ptr() == self.blank.data_ptr()


class Runner:
    """Runs the remote blocks of one model. Calls of different threads do not mix.

    Attributes:
        deep_prompts: trainable vectors ``[blocks, length, hidden]`` that are added to the first
            positions of each block's input, or None.
    """

    def __init__(
        self,
        connection: Connection,
        blocks: list[nn.Module],
        adapters: Adapters,
        *,
        returns_tuple: bool,
        context_length: int | None,
    ):
        self.connection, self.blocks, self.adapters = connection, blocks, adapters
        self.returns_tuple, self.context_length = returns_tuple, context_length
        self.deep_prompts: torch.Tensor | None = None
        self._inside: tuple[int, list[tuple[int, str, nn.Module]]] = (-1, [])
        self._local = threading.local()

    def __deepcopy__(self, memo: dict) -> Runner:
        """A copy of the model is another view on the same servers, with hooks of its own."""
        memo[id(self)] = twin = object.__new__(Runner)
        twin.__dict__.update(self.__dict__)
        twin.blocks = copy.deepcopy(self.blocks, memo)
        twin.adapters = copy.deepcopy(self.adapters, memo)
        twin._inside, twin._local = (-1, []), threading.local()
        return twin

    def __reduce__(self) -> Any:
        raise Unsupported(
            "a remote model is a live connection and cannot be pickled; save its adapter with "
            "save_pretrained, or connect again where you need it"
        )

    @property
    def generating(self) -> RemoteCache | None:
        """The cache that ``generate`` uses in this thread, if it still lives."""
        held: weakref.ref[RemoteCache] | None = getattr(self._local, "generating", None)
        return None if held is None else held()

    @generating.setter
    def generating(self, cache: RemoteCache) -> None:
        self._local.generating = weakref.ref(cache)

    def install(self, decoder: nn.Module) -> None:
        """Follow the calls of the module that owns the blocks."""
        self._signature = inspect.signature(decoder.forward)
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self._end, always_call=True)

    def _begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **bound}
        inputs.refuse_unknown(kwargs)
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs.get("input_ids") if tokens is None else tokens
        if tokens is None or tokens.is_meta:
            return (), kwargs
        rows, new = tokens.shape[:2]
        config: Any = decoder.config
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = RemoteCache(self.connection, lazy=use_cache is None)
            kwargs["past_key_values"] = cache
        inputs.check_cache(cache, self.connection, rows)
        position = 0 if cache is None else cache.length
        inputs.check_length(position, new, self.context_length)
        states = kwargs.get("output_hidden_states")
        states = config.output_hidden_states if states is None else states
        self._local.call = Call(
            cache,
            position,
            inputs.new_mask(kwargs.get("attention_mask"), cache, new),
            inputs.unusual_positions(kwargs.get("position_ids"), position),
            self.adapters.current(self.blocks, thorough=position == 0),
            self.adapters.dropout_seed(self.blocks),
            hooks.observed_boundaries(self.blocks, bool(states)),
            hooks.observed_inside(self._modules()),
        )
        return (), kwargs

    def _modules(self) -> list[tuple[int, str, nn.Module]]:
        """All modules inside of blocks; PEFT changes them when it injects adapters."""
        if self._inside[0] != self.adapters.injections:
            self._inside = (self.adapters.injections, hooks.modules_inside(self.blocks))
        return self._inside[1]

    def _end(self, *_: Any) -> None:
        self._local.call = None

    def run(self, index: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """The output of block ``index``; the network is asked only when it must be."""
        if hidden.is_meta or type(hidden).__name__ == "FakeTensor":
            return torch.empty_like(hidden)
        call: Call | None = getattr(self._local, "call", None)
        if call is None:
            return self._run_alone(index, hidden, kwargs)
        if not call.continues(index, hidden):
            if call.is_blank(hidden):
                raise Unsupported(
                    f"the model changes hidden states between blocks {index - 1} and {index} "
                    "outside of any hook; register a forward hook on that block"
                )
            self._fetch(call, index, hidden)
        elif call.piece == index:
            # The same values, but perhaps wrapped anew: the graph must follow the wrapping.
            call.piece_input = hidden
        for name, module in call.inside.get(index, ()):
            hooks.deliver(f"block {index}.{name}", module, call.outputs.inner[index, name])
        output = self._hand_out(call, index, hidden)
        if index == len(self.blocks) - 1 and call.cache is not None:
            call.cache.advance(hidden.shape[0], hidden.shape[1], call.mask)
        return output

    def _hand_out(self, call: Call, index: int, like: torch.Tensor) -> torch.Tensor:
        """The output of block ``index``, or a blank if it is not observed."""
        output = call.outputs.states.pop(index, None)
        if output is None:
            if call.blank is None:
                with torch.inference_mode(False):  # its tensors have no versions to recognise
                    blank = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
                    call.blank = blank.expand(like.shape)
            output = call.blank
        elif call.segment is not None and call.piece_input is not None:
            prompts = self._prompts(call.piece, index + 1)
            output = call.segment.node(call.piece, index + 1, call.piece_input, prompts, output)
            call.piece, call.piece_input = index + 1, output
        call.following, call.expected = index + 1, SameTensor(output)
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

    def _fetch(self, call: Call, index: int, hidden: torch.Tensor) -> None:
        """Ask the chain from block ``index`` on."""
        gradients = self._wants_gradients(hidden)
        cache = call.cache
        if cache is not None and call.position and gradients:
            raise Unsupported(
                "gradients through cached keys and values: call the model without "
                "past_key_values, or under torch.no_grad()"
            )
        stateless = cache is None or (call.position == 0 and (cache.lazy or gradients))
        if index > call.following and not stateless:
            raise Unsupported(
                f"block {call.following} was skipped, so it has no keys and values for these "
                "tokens; pass use_cache=False to run without some blocks"
            )
        request = self._request(call, index, hidden)
        if cache is not None:
            self._remember(call, cache, request)
        call.segment = None
        if cache is None or stateless:
            call.outputs, trails = self.connection.forward(request, keep=gradients)
            if gradients:
                weights = self.adapters.parameters if call.adapter else {}
                call.segment = Segment(self.connection, request, trails, weights)
                call.piece, call.piece_input = index, hidden
        else:
            states, inner = request.states, request.inner
            call.outputs = self.connection.step(cache.session, index, states, inner)
        received = call.outputs.states
        with torch.inference_mode(False):
            for block, state in received.items():
                received[block] = state.to(hidden.device)

    def _request(self, call: Call, index: int, hidden: torch.Tensor) -> Request:
        prompts = self._prompts(index, len(self.blocks))
        return Request(
            index,
            len(self.blocks),
            # A copy: hooks may write into the tensor that the model holds.
            hidden.detach().to("cpu", copy=True),
            call.position,
            mask=call.mask,
            position_ids=call.position_ids,
            states=sorted(block for block in call.states if block >= index),
            prompts=None if prompts is None else prompts.detach().to("cpu", hidden.dtype),
            adapter=call.adapter,
            inner=[
                (block, name)
                for block, modules in call.inside.items()
                if block >= index
                for name, _ in modules
            ],
            seed=call.seed,
        )

    def _remember(self, call: Call, cache: RemoteCache, request: Request) -> None:
        """Note the input in the session's history, from which caches are rebuilt."""
        session = cache.session
        if request.start:
            session.edit(request.start, request.hidden)
            return
        new = Pass(
            call.position,
            request.hidden.shape[1],
            {0: request.hidden},
            mask=call.mask,
            position_ids=call.position_ids,
        )
        session.begin(new, request.adapter, request.prompts)

    def _run_alone(self, index: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """A block that is called by itself, outside of the model's own forward."""
        if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
            raise Unsupported(
                f"block {index} was called by itself with a mask or a cache; call the model, or "
                "the block with hidden states and position_ids only"
            )
        ids = inputs.unusual_positions(kwargs.get("position_ids"), 0)
        adapter = self.adapters.current(self.blocks, thorough=True)
        sent = hidden.detach().to("cpu", copy=True)
        request = Request(index, index + 1, sent, 0, position_ids=ids, adapter=adapter)
        gradients = self._wants_gradients(hidden)
        outputs, trails = self.connection.forward(request, keep=gradients)
        output = outputs.states[index].to(hidden.device)
        if not gradients:
            return output
        weights = self.adapters.parameters if adapter else {}
        segment = Segment(self.connection, request, trails, weights)
        return segment.node(index, index + 1, hidden, None, output)
