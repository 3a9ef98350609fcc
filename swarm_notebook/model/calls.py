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

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from swarm_notebook.client.connection import Connection
from swarm_notebook.client.history import Pass
from swarm_notebook.client.request import Request
from swarm_notebook.errors import ContextTooLong, Unsupported
from swarm_notebook.model.cache import RemoteCache

# Once asked for hidden states, transformers leaves its recording hooks on every layer for good;
# they are idle in calls that do not ask.
_RECORDING_HOOKS = "transformers.utils.output_capturing"


@dataclass
class Call:
    """One run of the model's decoder, from its first block to its last."""

    cache: RemoteCache | None
    stateless: bool
    position: int
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    wanted: set[int]
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    # The block to come, and the input that it gets if nobody changes anything.
    following: int = 0
    expected: torch.Tensor | None = None
    version: int = 0
    blank: torch.Tensor | None = None

    def continues(self, index: int, hidden: torch.Tensor) -> bool:
        """Whether block ``index`` is called with what was handed out for it."""
        return (
            index == self.following and hidden is self.expected and hidden._version == self.version
        )

    def hand_out(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """The output of block ``index``, or a blank if it is not observed."""
        output = self.outputs.pop(index, None)
        if output is None:
            if self.blank is None:
                self.blank = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
                self.blank = self.blank.expand(like.shape)
            output = self.blank
        self.following, self.expected, self.version = index + 1, output, output._version
        return output


class Runner:
    """Runs the remote blocks of one model. Calls of different threads do not mix."""

    def __init__(
        self,
        connection: Connection,
        blocks: list[nn.Module],
        *,
        returns_tuple: bool,
        context_length: int | None,
    ):
        self.connection, self.blocks = connection, blocks
        self.returns_tuple, self.context_length = returns_tuple, context_length
        self._local = threading.local()

    def __deepcopy__(self, memo: dict) -> Runner:
        # A copy of the model is another view on the same servers.
        return self

    def __reduce__(self) -> Any:
        raise Unsupported(
            "a remote model is a live connection and cannot be pickled; save its adapter with "
            "save_pretrained, or connect again where you need it"
        )

    def install(self, decoder: nn.Module) -> None:
        """Follow the calls of the module that owns the blocks."""
        signature = inspect.signature(decoder.forward)
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs: self._begin(module, signature, args, kwargs),
            with_kwargs=True,
        )
        decoder.register_forward_hook(self._end, always_call=True)

    def _begin(
        self, decoder: nn.Module, signature: inspect.Signature, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        if args:
            bound = signature.bind_partial(*args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **bound}
        for name in ("output_attentions", "encoder_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise Unsupported(f"{name}: remote blocks return hidden states only")
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs.get("input_ids") if tokens is None else tokens
        if tokens is None or tokens.is_meta:
            return (), kwargs
        config: Any = decoder.config
        use_cache = kwargs.get("use_cache")
        cache = kwargs.get("past_key_values")
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = RemoteCache(self.connection, lazy=use_cache is None)
            kwargs["past_key_values"] = cache
        self._check_cache(cache)
        states = kwargs.get("output_hidden_states")
        states = config.output_hidden_states if states is None else states
        self._local.call = self._new_call(cache, tokens.shape[:2], kwargs, bool(states))
        return (), kwargs

    def _check_cache(self, cache: object) -> None:
        if cache is None:
            return
        if not isinstance(cache, RemoteCache):
            raise Unsupported(
                f"past_key_values is a {type(cache).__name__}; remote blocks keep their keys and "
                "values on the servers. Pass None, or what an earlier call of this model returned"
            )
        if cache.connection is not self.connection:
            raise ValueError("past_key_values belongs to another connection; start without it")

    def _new_call(
        self, cache: RemoteCache | None, shape: tuple[int, int], kwargs: dict, states: bool
    ) -> Call:
        rows, new = shape
        position = 0 if cache is None else cache.length
        if self.context_length is not None and position + new > self.context_length:
            raise ContextTooLong(
                f"{position + new} tokens ({position} cached, {new} new) are more than the "
                f"model's context of {self.context_length}; shorten the prompt"
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise Unsupported(
                "attention_mask: remote blocks take a mask of shape [batch, length] only"
            )
        if cache is None:
            mask = None if mask is None or mask.all() else mask.to("cpu", torch.uint8)
        else:
            if cache.length and cache.rows != rows:
                raise ValueError(f"the batch has {rows} rows, past_key_values has {cache.rows}")
            mask = cache.new_mask(mask, new)
        return Call(
            cache,
            stateless=cache is None or (cache.lazy and position == 0),
            position=position,
            mask=mask,
            position_ids=_unusual(kwargs.get("position_ids"), position),
            wanted=self._observed(states),
        )

    def _observed(self, states: bool) -> set[int]:
        """Blocks whose outputs somebody will look at: those around observed blocks."""
        everywhere = states or torch_module._has_any_global_hook()
        wanted: set[int] = set()
        for index, block in enumerate(self.blocks):
            if everywhere or _is_observed(block):
                wanted.update((index - 1, index))
        wanted.discard(-1)
        return wanted

    def _end(self, *_: Any) -> None:
        self._local.call = None

    def run(self, index: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """The output of block ``index``; the network is asked only when it must be."""
        call: Call | None = getattr(self._local, "call", None)
        if hidden.is_meta or type(hidden).__name__ == "FakeTensor":
            return torch.empty_like(hidden)
        if call is None:
            return self._run_alone(index, hidden, kwargs)
        if not call.continues(index, hidden):
            if call.blank is not None and hidden.data_ptr() == call.blank.data_ptr():
                raise Unsupported(
                    f"the model changes hidden states between blocks {index - 1} and {index} "
                    "outside of any hook; register a forward hook on that block"
                )
            self._fetch(call, index, hidden)
        output = call.hand_out(index, hidden)
        if index == len(self.blocks) - 1 and call.cache is not None:
            call.cache.advance(hidden.shape[0], hidden.shape[1], call.mask)
        return output

    def _fetch(self, call: Call, index: int, hidden: torch.Tensor) -> None:
        """Ask the chain from block ``index`` on."""
        if index > call.following and not call.stateless:
            raise Unsupported(
                f"block {call.following} was skipped, so it has no keys and values for these "
                "tokens; pass use_cache=False to run without some blocks"
            )
        sent = hidden.detach().clone() if hidden.device.type == "cpu" else hidden.detach().cpu()
        states = sorted(block for block in call.wanted if block >= index)
        if call.cache is not None:
            session = call.cache.session
            if index == 0:
                new = Pass(call.position, hidden.shape[1], {0: sent}, {}, call.mask)
                new.position_ids = call.position_ids
                session.begin(new)
            else:
                session.edit(index, sent)
        if call.stateless or call.cache is None:
            last = len(self.blocks)
            request = Request(index, last, sent, 0, None, call.mask, call.position_ids, states)
            outputs, _ = self.connection.forward(request)
        else:
            outputs = self.connection.step(call.cache.session, index, states)
        call.outputs = {block: output.to(hidden.device) for block, output in outputs.states.items()}

    def _run_alone(self, index: int, hidden: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """A block that is called by itself, outside of the model's own forward."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None or cache is not None:
            raise Unsupported(
                f"block {index} was called by itself with a mask or a cache; call the model, or "
                "the block with hidden states and position_ids only"
            )
        ids = _unusual(kwargs.get("position_ids"), 0)
        request = Request(index, index + 1, hidden.detach().cpu(), 0, None, None, ids)
        outputs, _ = self.connection.forward(request)
        return outputs.states[index].to(hidden.device)


def _is_observed(block: nn.Module) -> bool:
    if block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        return True
    if "forward" in block.__dict__:
        return True
    return any(
        getattr(hook, "__module__", "") != _RECORDING_HOOKS
        for hook in block._forward_hooks.values()
    )


def _unusual(position_ids: torch.Tensor | None, position: int) -> torch.Tensor | None:
    """Position ids that differ from a plain count from ``position`` on, else None."""
    if position_ids is None:
        return None
    if position_ids.dim() != 2:
        raise Unsupported(
            f"position_ids of shape {list(position_ids.shape)}: remote blocks take [batch, length]"
        )
    ids = position_ids.detach().to("cpu", torch.int64)
    plain = torch.arange(position, position + ids.shape[1])
    return None if bool((ids == plain).all()) else ids
