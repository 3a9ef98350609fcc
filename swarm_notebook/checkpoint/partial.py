"""Models of which only a part is loaded: a server's blocks, or a notebook's embeddings and head.

Both are the model's own transformers class, loaded by transformers' own `from_pretrained`, so that
renamed and fused weights, precision plans and tied embeddings are handled by the code that knows them.
Two things make the loading partial:

- While `from_pretrained` constructs the model (on meta: no memory), a subclass with the same name
  removes what is not wanted from it, before any weight is sought. Afterwards the object gets its
  original class back.
- The state dict that is handed over holds `LazyTensor`s of the wanted part only (weights.py).

Blocks keep the ``layer_idx`` that they have in the whole model; names and lists count from zero.
Constructing a model sets process-wide defaults of torch for a moment, so one lock serialises it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.checkpoint.anatomy import (
    Trunk,
    find_trunk,
    layer_returns_tuple,
    restrict_config,
    silence_branches,
)
from swarm_notebook.checkpoint.weights import LazyTensor, block_index, renumbered
from swarm_notebook.errors import BlocksOutOfRange, ModelNotFound, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from swarm_notebook.checkpoint.source import ModelSource

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read), from whatever thread reads."""

_construction = threading.Lock()


@dataclass(frozen=True)
class LoadedBlocks:
    """Blocks start..end-1 of a model, as a base model that has no others.

    Called with ``inputs_embeds``, `model` gives in ``last_hidden_state`` exactly what these blocks make
    of it: embeddings, norms and projections around them do nothing.
    """

    model: PreTrainedModel
    decoder: nn.Module
    layers_name: str
    start: int
    end: int

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self.layers_name)


@dataclass(frozen=True)
class DecoderInfo:
    """Where the (placeholder) blocks of a causal language model are, and how they answer.

    Attributes:
        returns_tuple: a block's forward returns ``(hidden, …)`` rather than ``hidden``.
    """

    decoder: nn.Module
    layers_name: str
    num_blocks: int
    hidden_size: int
    returns_tuple: bool

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self.layers_name)


def load_blocks(
    source: ModelSource,
    start: int,
    end: int,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LoadedBlocks:
    """Load blocks start..end-1, and read nothing else from the checkpoint."""
    from transformers import MODEL_MAPPING

    config = source.config()
    if not 0 <= start < end <= config.num_hidden_layers:
        raise BlocksOutOfRange(
            f"blocks {start}:{end} of {source.name}: the model has {config.num_hidden_layers} blocks; "
            f"give start:end with 0 <= start < end <= {config.num_hidden_layers}"
        )
    trunks: list[Trunk] = []

    def keep_blocks(model: PreTrainedModel) -> None:
        trunk = find_trunk(model)
        trunk.set_layers(nn.ModuleList(list(trunk.layers)[start:end]))
        silence_branches(trunk)
        restrict_config(model.config, start, end)
        trunks.append(trunk)

    weights = source.weights()
    wanted = [name for name in weights.names() if _in_range(name, start, end)]
    tensors = {renumbered(name, start): lazy for name, lazy in weights.lazy(wanted).items()}
    model = _load(
        source, MODEL_MAPPING[type(config)], config, keep_blocks, tensors, dtype, device, progress
    )
    model.requires_grad_(False)
    _check_passes_through(model, trunks[0])
    return LoadedBlocks(model, trunks[0].decoder, trunks[0].layers_name, start, end)


def _in_range(name: str, start: int, end: int) -> bool:
    index = block_index(name)
    return index is not None and start <= index < end


def load_edges(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, DecoderInfo]:
    """Load everything but the blocks: embeddings, final norm, head.

    The blocks are there as objects of their own class, with the right names, shapes and dtypes, but
    every parameter and buffer in them is a zero of stride zero, which takes no memory.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = source.config()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    taken: list[tuple[Trunk, nn.ModuleList]] = []

    def take_blocks_away(model: PreTrainedModel) -> None:
        trunk = find_trunk(model)
        taken.append((trunk, trunk.layers))
        trunk.set_layers(nn.ModuleList())

    weights = source.weights()
    wanted = [name for name in weights.names() if block_index(name) is None]
    tensors = weights.lazy(wanted)
    model = _load(source, model_class, config, take_blocks_away, tensors, dtype, device, progress)
    (trunk, layers) = taken[0]
    for layer in layers:
        _empty(layer)
    trunk.set_layers(layers.eval())
    generation_config = source.generation_config()
    if generation_config is not None:
        model.generation_config = generation_config
    with _construction:
        returns_tuple = layer_returns_tuple(type(model), config)
    return model, DecoderInfo(
        decoder=trunk.decoder,
        layers_name=trunk.layers_name,
        num_blocks=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        returns_tuple=returns_tuple,
    )


def _empty(layer: nn.Module) -> None:
    """Put a placeholder of the same shape and dtype in the place of every tensor of `layer`."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    _placeholder(parameter), requires_grad=False
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _placeholder(buffer)


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _load(
    source: ModelSource,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    edit: Callable[[PreTrainedModel], None],
    tensors: dict[str, LazyTensor],
    dtype: torch.dtype,
    device: str | torch.device,
    progress: Progress | None,
) -> PreTrainedModel:
    """transformers' `from_pretrained` of `model_class`, after `edit` has changed the empty model."""

    def construct(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        edit(self)

    # The same name and module: transformers looks up conversions and recorders by them.
    names = {key: getattr(model_class, key) for key in ("__module__", "__qualname__")}
    partial_class = type(model_class.__name__, (model_class,), {"__init__": construct, **names})
    placement = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    if progress is not None:
        tensors = _reporting(tensors, progress)
    with _construction, _no_progress_bars():
        try:
            model, report = partial_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                output_loading_info=True,
                **placement,
            )
        except RuntimeError as error:
            raise ModelNotFound(
                f"the weights of {source.name} do not fit its config: {error}"
            ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelNotFound(
            f"the weights of {source.name} lack {len(missing)} tensors that {model_class.__name__} needs "
            f"({', '.join(missing[:3])}, …); fetch the whole checkpoint"
        )
    model.__class__ = model_class
    model.name_or_path = model.config.name_or_path = source.name
    return model


def _reporting(tensors: dict[str, LazyTensor], progress: Progress) -> dict[str, LazyTensor]:
    """The same tensors; reading one reports how much has been read."""
    total = sum(lazy.nbytes for lazy in tensors.values())
    done = 0
    lock = threading.Lock()

    def reader(lazy: LazyTensor) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            nonlocal done
            tensor = lazy.read()
            with lock:
                done += lazy.nbytes
                progress(done, total)
            return tensor

        return read

    return {
        name: LazyTensor(reader(lazy), lazy.nbytes, lazy.slice) for name, lazy in tensors.items()
    }


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Whoever passes `progress` shows it; transformers' bar would print into the notebook as well."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@torch.no_grad()
def _check_passes_through(model: PreTrainedModel, trunk: Trunk) -> None:
    """Refuse a model that changes hidden states outside of its blocks, say by a constant factor."""
    layers = trunk.layers
    hidden = torch.randn(1, 2, model.config.hidden_size).to(layers[0].parameters().__next__())
    trunk.set_layers(nn.ModuleList())
    try:
        output = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    finally:
        trunk.set_layers(layers)
    if not torch.equal(output, hidden):
        raise Unsupported(
            f"{type(model).__name__} changes the hidden states outside of its blocks, so a chain of "
            "servers would change them once per server; this architecture cannot be split yet"
        )
