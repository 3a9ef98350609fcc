"""Runs any contiguous run of the hosted blocks, through the model's own HF decoder.

`checkpoint.load_blocks` gives an HF base model whose layer list holds only the hosted blocks and
whose embedding side and final norm do nothing, so calling it with hidden states is exactly the
chain of these blocks: rotary embeddings, masks, sliding windows, experts and all else are HF's
own code. A request may name fewer blocks than are hosted; for those the decoder is copied
shallowly (same layer objects, shorter list, config to match), and the copies are kept.

Outputs of inner blocks and deep prompts go through forward hooks that live during one call. All
calls come from the one torch thread, so hooks never see another request's states.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedConfig

from swarm_notebook.checkpoint.anatomy import restrict_config
from swarm_notebook.checkpoint.packed import storages
from swarm_notebook.checkpoint.states import input_state, output_state, with_input_state
from swarm_notebook.errors import Unsupported
from swarm_notebook.server.adapters.low_rank import Additions
from swarm_notebook.server.adapters.mixing import Tuners
from swarm_notebook.server.engine.attention.batch import BatchCache, Part, attending
from swarm_notebook.server.engine.captures import Captures
from swarm_notebook.server.engine.kv.cache import SessionCache
from swarm_notebook.server.engine.rotary import stretching_kinds, stretching_modules, turning_by

# Sub-ranges that are kept ready: each is a decoder without weights of its own, some kB.
MAX_VIEWS = 64
# What transformers calls the masks that depend on nothing but positions.
KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class Span:
    """The blocks ``[start, end)`` of a model, ready to run; it stays as it was made.

    Args:
        decoder: an HF base model with these blocks alone, as `checkpoint.load_blocks` makes it.
        layers_name: what it calls the list of its blocks.
        start: the index that the first of them has in the whole model.

    Attributes:
        dtype, device: of the weights, and so of all that goes through the blocks.
        takes_positions: whether the decoder can be told the positions of the tokens.

    Raises:
        Unsupported: blocks that remember something else than keys and values per position.
    """

    def __init__(self, decoder: nn.Module, layers_name: str, start: int):
        _check_kinds(decoder)
        self._decoder: Final = decoder
        self.layers_name: Final = layers_name
        self.layers: Final[tuple[nn.Module, ...]] = tuple(getattr(decoder, layers_name))
        self.start: Final = start
        self.end: Final = start + len(self.layers)
        parameters = [one for layer in self.layers for one in layer.parameters()]
        # Libraries pack weights into integers, or floats of a byte, in which nobody computes.
        computed = (one.dtype for one in parameters if one.is_floating_point() and one.itemsize > 1)
        config: Any = decoder.config
        self.dtype: Final[torch.dtype] = next(computed, config.dtype)
        self.device: Final = parameters[0].device
        self.takes_positions: Final = (
            "position_ids" in inspect.signature(decoder.forward).parameters
        )
        self._stretching: Final = stretching_modules(decoder)
        self._views: Final[OrderedDict[tuple[int, int], nn.Module]] = OrderedDict()

    @property
    def stretching(self) -> set[str]:
        """The kinds of its rotary embeddings that depend on the longest sequence of a call."""
        return {kind for module in self._stretching for kind in stretching_kinds(module)}

    @property
    def config(self) -> Any:
        """The decoder's."""
        return self._decoder.config

    def cloned_decoder(self) -> nn.Module:
        """Modules and configs of its own around the same weights and buffers."""
        shared = [*self._decoder.parameters(), *self._decoder.buffers()]
        return copy.deepcopy(self._decoder, {id(tensor): tensor for tensor in shared})

    def layer(self, block: int) -> nn.Module:
        """The block of this index."""
        return self.layers[block - self.start]

    @property
    def host(self) -> Span:
        """The blocks whose batches those that run with these can share."""
        return self

    @property
    def tuners(self) -> Tuners:
        """The layers of an adapter, which batches of `host` have to ask; there are none here."""
        return {}

    @property
    def additions(self) -> Additions | None:
        """What an adapter adds, if that is all it does; None without one."""
        return None

    @cached_property
    def storages(self) -> frozenset[int]:
        """Where the weights and buffers of the blocks are in memory."""
        return frozenset(
            storage.data_ptr()
            for layer in self.layers
            for tensor in (*layer.parameters(), *layer.buffers())
            for storage in storages(tensor)
        )

    @torch.inference_mode()
    def run(self, start: int, end: int, hidden: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        """`compute` without gradients, and without what they cost."""
        return self.compute(start, end, hidden, **options)

    def compute(
        self,
        start: int,
        end: int,
        hidden: torch.Tensor,
        *,
        cache: SessionCache | BatchCache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | Sequence[torch.Tensor] | None = None,
        states: Sequence[int] = (),
        inner: Sequence[tuple[int, str]] = (),
        inner_bytes: int | None = None,
        rotary_length: int | None = None,
    ) -> list[torch.Tensor]:
        """The output of blocks ``[start, end)`` for ``hidden``, then the states and ``inner``.

        Args:
            hidden: ``[rows, positions, hidden size]``, the input of block ``start``.
            cache: what earlier positions left behind; the new ones are appended.
            attention_mask: ``[rows, cached + new positions]``, 0 for padding.
            position_ids: ``[rows or 1, new positions]``; the decoder counts by itself if None.
            prompts: of each block ``[rows or 1, length, hidden size]``, added to the first
                positions of its input.
            states: indices of the blocks whose outputs come back as well.
            inner: modules inside of blocks whose outputs come back as well, without gradients.
            inner_bytes: how many bytes those may have.
            rotary_length: what rotary embeddings that depend on a length go by (see `rotary`);
                None: the positions of this call.

        Raises:
            BadRequest: an inner module is not there, or has no single tensor as its output.
        """
        hidden = hidden.to(self.device, self.dtype)
        attention_mask, position_ids = self._here(attention_mask), self._here(position_ids)
        if hidden.shape[1] == 0:
            return [hidden] * (1 + len(states) + len(inner))
        arguments: dict[str, Any] = {"inputs_embeds": hidden, "attention_mask": attention_mask}
        if self.takes_positions:
            arguments["position_ids"] = position_ids
        if cache is not None:
            cache.focus(start, end)
        view = self._view(start, end)
        captured: dict[int, torch.Tensor] = {}
        # The last block's output is the result itself (the final norm is a no-op).
        ahead = {index for index in states if index != end - 1}
        modules = Captures(self.layers, self.start, inner, inner_bytes)
        rotating = turning_by(self._stretching, rotary_length)
        with self._hooked(start, ahead, captured, prompts), modules, rotating:
            output = view(past_key_values=cache, use_cache=cache is not None, **arguments)
        result = output.last_hidden_state
        return [result, *(captured.get(index, result) for index in states), *modules.outputs()]

    def _here(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(self.device)

    def run_batch(
        self,
        start: int,
        end: int,
        hidden: Sequence[torch.Tensor],
        parts: Sequence[Part],
        **options: Any,
    ) -> list[list[torch.Tensor]]:
        """What `run` gives for each of several sessions, in one call for all of them; on the CPU.

        Args:
            hidden: each session's ``[rows, positions, hidden size]``.
            parts: the sessions, in the same order.
            options: ``position_ids`` ``[1, tokens]`` and ``states`` as in `compute`.
        """
        flat = torch.cat([own.reshape(1, -1, own.shape[2]) for own in hidden], dim=1)
        cache = BatchCache(parts)
        view: Any = self._view(start, end)
        configs = [view.config, *self._configs]
        with (
            attending(configs, cache, str(view.config._attn_implementation)),
            cache.mixture.hooked(self, start, end),
        ):
            outputs = [out.cpu() for out in self.run(start, end, flat, cache=cache, **options)]
        sizes = [part.tokens for part in parts]
        shapes = [(part.rows, part.length, -1) for part in parts]
        split = [output[0].split(sizes) for output in outputs]
        return [
            [output[index].view(shape) for output in split] for index, shape in enumerate(shapes)
        ]

    @cached_property
    def _configs(self) -> list[PreTrainedConfig]:
        """The configs that modules inside of the blocks look at."""
        found = {
            id(value): value
            for layer in self.layers
            for module in layer.modules()
            for value in vars(module).values()
            if isinstance(value, PreTrainedConfig)
        }
        return list(found.values())

    def _view(self, start: int, end: int) -> nn.Module:
        """The decoder of the blocks ``[start, end)``."""
        if (start, end) == (self.start, self.end):
            return self._decoder
        view = self._views.get((start, end))
        if view is None:
            layers = self.layers[start - self.start : end - self.start]
            view = self._views[start, end] = self.decoder_around(start, layers)
            if len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end((start, end))
        return view

    def decoder_around(self, start: int, layers: Sequence[nn.Module]) -> nn.Module:
        """The decoder with ``layers`` as its only blocks, in the place of those from ``start``."""
        first = start - self.start
        view = copy.copy(self._decoder)
        # A shallow copy shares its table of children with the original: give it its own.
        view._modules = dict(self._decoder._modules)
        view._modules[self.layers_name] = nn.ModuleList(layers)
        config: Any = copy.copy(self._decoder.config)
        restrict_config(config, first, first + len(layers))
        view.config = config
        return view

    def adapter_weights(self, start: int, end: int) -> dict[str, nn.Parameter]:
        """The parameters of an adapter in blocks ``[start, end)``; there is none here."""
        return {}

    @contextmanager
    def _hooked(
        self,
        start: int,
        states: set[int],
        captured: dict[int, torch.Tensor],
        prompts: torch.Tensor | Sequence[torch.Tensor] | None,
    ) -> Iterator[None]:
        """Hooks that keep the outputs of the blocks ``states`` and add ``prompts`` to inputs."""
        with ExitStack() as hooks:
            for index in states:
                hook = _keep(captured, index)
                hooks.enter_context(self.layer(index).register_forward_hook(hook))
            for index, prompt in enumerate(() if prompts is None else prompts, start):
                if prompt.shape[1]:
                    add = _add(prompt.to(self.device, self.dtype))
                    hooks.enter_context(
                        self.layer(index).register_forward_pre_hook(add, with_kwargs=True)
                    )
            yield


def _check_kinds(decoder: nn.Module) -> None:
    """Refuse blocks that remember anything else than keys and values per position."""
    config: Any = decoder.config
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - KINDS):
        raise Unsupported(
            f"{type(decoder).__name__} has blocks of the kind {', '.join(other)}, whose state "
            f"cannot be rolled back to an earlier position; served are {', '.join(sorted(KINDS))}"
        )


def _keep(captured: dict[int, torch.Tensor], index: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        captured[index] = output_state(output)

    return hook


def _add(prompt: torch.Tensor) -> Callable[..., tuple[tuple, dict]]:
    def hook(
        _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = input_state(inputs, named).clone()
        changed[:, : prompt.shape[1]] += prompt
        return with_input_state(inputs, named, changed)

    return hook
