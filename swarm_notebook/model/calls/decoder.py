"""Where a run of the decoder begins and ends, what is asked of it, and who looks at its blocks.

A hook before the decoder reads what the model is called with and opens a `Call`; a hook behind it
closes the call. What somebody looks at is asked when a call opens, since only that travels, and
again while it goes on: hooks may register others, on blocks that are still to come.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from types import CodeType
from typing import Any

from torch import nn

from swarm_notebook.client.connection import Connection
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.adapters.injected import Adapters
from swarm_notebook.model.blocks import hooks
from swarm_notebook.model.blocks.blocklist import watched
from swarm_notebook.model.blocks.intact import refuse_transforms
from swarm_notebook.model.blocks.layout import Layout, plan
from swarm_notebook.model.blocks.observer import Observer
from swarm_notebook.model.calls import inputs
from swarm_notebook.model.calls.call import Call, is_running
from swarm_notebook.model.calls.kept import Kept
from swarm_notebook.model.calls.rotary import Rotations
from swarm_notebook.model.generation.cache import RemoteCache, adopted


class ThreadState(threading.local):
    """What one thread is at.

    Attributes:
        call: the run of the decoder.
        given: what the block that is called next was called with, before its hooks.
        generating: the cache that ``generate`` uses.
    """

    call: Call | None = None
    given: dict[str, Any] | None = None
    generating: weakref.ref[RemoteCache] | None = None


class DecoderCalls:
    """Follows the calls of the module that owns the blocks. Those of different threads do not mix.

    Attributes:
        home: the blocks that run in the notebook.
        here: what the present thread is at.
        kept: of how many positions a call needs the last block's output.
        recorded: what transformers records of modules inside of blocks.
    """

    blocks: list[nn.Module]
    connection: Connection
    adapters: Adapters
    kept: Kept
    observer: Observer

    def __init__(
        self,
        decoder: nn.Module,
        layers_name: str,
        blocks: list[nn.Module],
        connection: Connection,
        adapters: Adapters,
        *,
        context_length: int | None,
    ):
        self.blocks, self.connection, self.adapters = blocks, connection, adapters
        self.home: frozenset[int] = frozenset()
        self.kept, self.observer = Kept(), Observer(blocks)
        self.rotations: Rotations = Rotations(decoder, blocks)
        self._masks = hooks.Masks(decoder)
        self.recorded: hooks.RecordedOutputs = hooks.RecordedOutputs(decoder, self._masks)
        self._layers_name, self._context_length = layers_name, context_length
        self._planned: tuple[list[nn.Module], frozenset[int], Layout] | None = None
        self._signature = inspect.signature(decoder.forward)
        self._forward_code = inspect.unwrap(type(decoder).forward).__code__
        self.here: ThreadState = ThreadState()
        watched(getattr(decoder, layers_name), self._shown)
        decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        decoder.register_forward_hook(self.end, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderCalls:
        memo[id(self)] = twin = object.__new__(DecoderCalls)
        twin.__dict__.update(self.__dict__)
        for name in ("blocks", "adapters", "observer", "rotations", "_masks", "recorded"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        twin.here, twin.kept = ThreadState(), Kept()
        return twin

    def _begin(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **bound}
        tokens = kwargs.get("inputs_embeds")
        tokens = kwargs.get("input_ids") if tokens is None else tokens
        if tokens is None or inputs.without_values(tokens):
            return (), kwargs
        rows, new = inputs.size(tokens)
        config: Any = decoder.config
        layers = list(getattr(decoder, self._layers_name))
        # Many decoders stop at this number: so transformers leaves early to guess tokens.
        layers = layers[: config.num_hidden_layers]
        layout, own = self._layout(layers)
        inputs.refuse_unknown(kwargs, config, layout)
        remote = [index for index in layout.order if index not in layout.home]
        injections, continued = self.adapters.injections, _continued(kwargs.get("past_key_values"))
        observed = self.observer.observed(layout, injections, continued=continued)
        modules = self.observer.modules(layout, injections)
        cache = self._cache(kwargs, config)
        masked = kwargs.get("attention_mask")
        if not remote and not isinstance(cache, RemoteCache):
            cache = masked = None  # blocks at home go on with whatever another one has filled
        inputs.check_cache(cache, self.connection, rows)
        position = 0 if cache is None else cache.length
        if remote:
            self._check_alike(remote[0], position)
        if cache is not None:
            self._check_order(cache, layout)
        inputs.check_length(position, new, self._context_length)
        states = kwargs.get("output_hidden_states")
        states = config.output_hidden_states if states is None else states
        mask = inputs.new_mask(masked, cache, new, remote=bool(remote))
        ids = self.rotations.here(kwargs.get("position_ids"))
        ids = inputs.unusual_positions(ids, position)
        packs = cache is None and masked is None
        if cache is not None and layout.home and kwargs.get("attention_mask") is None:
            # The servers remember what was masked; blocks at home see what they are given.
            kwargs["attention_mask"] = cache.whole_mask(new)
        if cache is not None and not layout.ascending:
            # Nobody has asked for it, and a block has one place in it.
            kwargs["past_key_values"], kwargs["use_cache"], cache = None, False, None
        recorded = self.recorded.asked(kwargs, modules)
        self.here.given = None  # of a call that did not come to its end
        kept = self.kept.positions(new, self.blocks)
        last = len(self.blocks) - 1
        ends = own and layout.order[-1:] == (last,)
        unseen = ends and not states and last not in observed.boundaries
        boundaries = hooks.observed_boundaries(self.blocks, True) if states else observed.boundaries
        self.here.call = Call(
            cache=cache,
            layout=layout,
            rows=rows,
            new=new,
            position=position,
            mask=mask,
            position_ids=ids,
            adapter=self.adapters.current(self.blocks, thorough=position == 0),
            seed=self.adapters.dropout_seed(self.blocks),
            states=boundaries,
            inside=hooks.observed_inside(modules, recorded) if recorded else dict(observed.inside),
            recorded=recorded,
            last=position + new if ids is None else int(ids.max()) + 1,
            kept=kept if unseen else None,
            edited=frozenset() if cache is None else cache.session.edited,
            packs=packs,
            asked=self.rotations.count,
            hooked=observed.boundaries,
            outer=self._outer(decoder),
            preceded=hooks.seen_outside(decoder, self._layers_name),
            whole=own and not boundaries and layout.one_stretch,
        )
        if not layout.home:
            self._masks.leave_out()
        return (), kwargs

    def _layout(self, layers: list[nn.Module]) -> tuple[Layout, bool]:
        """The layout of the decoder's list, and whether there are blocks alone in it."""
        planned = self._planned
        if planned is not None and planned[:2] == (layers, self.home):
            return planned[2], True  # as in nearly all calls
        layout = plan(layers, self.blocks, self.home)
        own = layers == [self.blocks[index] for index in layout.order]
        # What else is in it may be another around the same block the next time.
        self._planned = (layers, self.home, layout) if own else None
        return layout, own

    def _cache(self, kwargs: dict[str, Any], config: Any) -> Any:
        """What the call fills, which is made here if the caller has none and wants one."""
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is not None:
            return adopted(cache, self.connection)
        if config.use_cache if use_cache is None else use_cache:
            cache = kwargs["past_key_values"] = RemoteCache(self.connection, lazy=use_cache is None)
        return cache

    def _check_alike(self, block: int, position: int) -> None:
        """Refuse a call that its servers would compute in another way than it would be here."""
        refuse_transforms(block)
        if position == 0:
            self.rotations.check()
            self._masks.check(block)

    def _check_order(self, cache: RemoteCache, layout: Layout) -> None:
        """Refuse a cache that an unusual order of blocks cannot fill."""
        if not layout.ascending and (cache.length or not cache.lazy):
            raise Unsupported(
                f"the list of blocks repeats or exchanges blocks ({list(layout.order)}), each of "
                "which has one place in a cache; pass use_cache=False"
            )
        cache.continue_with(layout)

    def _outer(self, decoder: nn.Module) -> Call | None:
        """The call that is under way, if it is a hook of it that calls the model."""
        call = self.here.call  # else one that was interrupted
        return call if call is not None and is_running(self._forward_code, decoder) else None

    def end(self, _decoder: object = None, _args: object = None, output: Any = None) -> None:
        call = self.here.call
        self.here.call = None if call is None else call.outer
        self._masks.restore()
        if call is None or output is None or not call.place:
            return
        if call.blank:
            raise Unsupported(
                f"the model stopped behind block {call.following - 1}, though more blocks are in "
                "its list: cut the list instead (layers = layers[:n])"
            )
        if call.cache is not None:
            call.cache.advance(call.rows, call.new, call.mask)

    def _shown(self, asking: CodeType) -> list[nn.Module] | None:
        """What the decoder's forward sees of its blocks: the first one, if it stands for all."""
        call = self.here.call
        if call is None or asking is not self._forward_code:
            return None
        if call.preceded:
            found = self.observer.observed(call.layout, self.adapters.injections, continued=True)
            call.look_at(found.boundaries, len(self.blocks))
            for index, modules in found.inside.items():
                call.inside.setdefault(index, modules)
        if not call.whole or call.inside:
            return None
        call.shortened = True
        return [self.blocks[call.layout.order[0]]]

    def look_again(self, call: Call, index: int) -> bool:
        """Whether a hook has put others on block ``index`` since the model was called."""
        if not call.hooked and not call.inside:
            return False  # nobody's code runs in between
        late = index not in call.states and hooks.is_observed(self.blocks[index])
        if late:
            call.look_at({index - 1, index} - {-1}, len(self.blocks))
        more = self.observer.late(index, call.inside.get(index, ()))
        if more is not None:
            call.inside[index] = more
        return late or more is not None


def _continued(cache: object) -> bool:
    return isinstance(cache, RemoteCache) and cache.length > 0
