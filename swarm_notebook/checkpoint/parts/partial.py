"""Models of which only a part is loaded: a server's blocks, or a notebook's embeddings and head.

Both are the model's own transformers class (loading.py says how they are loaded). What is not
wanted is taken out while the model is still empty, so it never takes memory and its weights are
never read. Blocks keep the ``layer_idx`` that they have in the whole model; the names of their
parameters and the list that holds them count from zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.checkpoint.anatomy import (
    Trunk,
    find_trunk,
    restrict_config,
    returns_tuple,
    silence_branches,
)
from swarm_notebook.checkpoint.files.quantised import (
    for_blocks,
    headers_of_blocks,
    is_float,
    without_quantizer,
)
from swarm_notebook.checkpoint.files.weights import block_index, renumbered
from swarm_notebook.checkpoint.parts.loading import Progress, class_for, load
from swarm_notebook.checkpoint.parts.passthrough import hand_over_alike, make_transparent
from swarm_notebook.errors import BlocksOutOfRange

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from swarm_notebook.checkpoint.files.source import ModelSource


@dataclass(frozen=True)
class LoadedBlocks:
    """Blocks of a model, from ``start`` on, as a base model that has no others.

    Called with ``inputs_embeds``, `model` gives in ``last_hidden_state`` exactly what these blocks
    make of it: embeddings, norms and projections around them do nothing.
    """

    model: PreTrainedModel
    decoder: nn.Module
    layers_name: str
    start: int

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.decoder, self.layers_name)

    @property
    def end(self) -> int:
        return self.start + len(self.layers)

    def part(self, start: int, end: int) -> LoadedBlocks:
        """The blocks ``[start, end)`` of these: modules of their own around the same tensors."""
        memo: dict[int, Any] = {
            id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        model = copy.deepcopy(self.model, memo)
        decoder: nn.Module = memo[id(self.decoder)]
        layers = getattr(decoder, self.layers_name)[start - self.start : end - self.start]
        setattr(decoder, self.layers_name, layers)
        restrict_config(model.config, start - self.start, end - self.start)
        return LoadedBlocks(model, decoder, self.layers_name, start)


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


def bare_layers(source: ModelSource) -> nn.ModuleList:
    """All blocks of a model as its config alone describes them: they take no memory."""
    from transformers import MODEL_MAPPING

    config = source.config()
    without_quantizer(config)
    with torch.device("meta"):
        return find_trunk(class_for(source, MODEL_MAPPING, "base model")(config)).layers


def block_of_zeros(
    source: ModelSource, index: int, *, dtype: torch.dtype, device: str | torch.device
) -> LoadedBlocks:
    """A block as large as the model's own, to run what its weights do not matter for."""
    from transformers import MODEL_MAPPING

    config = source.config()
    without_quantizer(config)
    config.dtype = dtype
    with torch.device("meta"):
        model = class_for(source, MODEL_MAPPING, "base model")(config)
    trunk = find_trunk(model)
    trunk.set_layers(nn.ModuleList([trunk.layers[index]]))
    silence_branches(trunk)
    restrict_config(model.config, index, index + 1)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                zeros = torch.zeros(weight.shape, dtype=dtype, device=device)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device=device)
    return LoadedBlocks(model.eval(), trunk.decoder, trunk.layers_name, index)


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

    count = source.config().num_hidden_layers
    if not 0 <= start < end <= count:
        raise BlocksOutOfRange(
            f"blocks {start}:{end} of {source.name}: the model has {count} blocks; "
            f"give start:end with 0 <= start < end <= {count}"
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
    model_class: Any = class_for(source, MODEL_MAPPING, "base model")
    prefix, quantised = model_class.base_model_prefix, source.quantised_by is not None
    model = load(
        source,
        model_class,
        keep_blocks,
        tensors,
        headers=headers_of_blocks(weights, wanted, start, end, prefix) if quantised else {},
        dtype=dtype,
        device=device,
        progress=progress,
        describe=lambda config: for_blocks(
            config,
            start,
            end,
            prefix,
            on_cpu=torch.device(device).type == "cpu",
        ),
    )
    trunk = trunks[0]
    make_transparent(model, trunk)
    return LoadedBlocks(model, trunk.decoder, trunk.layers_name, start)


def load_one_by_one(
    source: ModelSource,
    start: int,
    end: int,
    change: Callable[[LoadedBlocks], None],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LoadedBlocks:
    """As `load_blocks`, but block by block: each is changed before the next one is read.

    So blocks that ``change`` makes smaller never take the memory of all of them.
    """
    sizes = [0] * (end - start)
    parts: list[LoadedBlocks] = []
    for block in range(start, end):

        def told(done: int, total: int, block: int = block) -> None:
            sizes[block - start] = total
            if progress is not None:
                # Those that come are taken to be like this one.
                read = sum(sizes[: block - start]) + done
                progress(read, sum(sizes) + total * (end - block - 1))

        one = load_blocks(source, block, block + 1, dtype=dtype, device=device, progress=told)
        change(one)
        parts.append(one)
    if not parts:
        raise BlocksOutOfRange(f"blocks {start}:{end} of {source.name}: none")
    return joined(source, parts)


def joined(source: ModelSource, parts: Sequence[LoadedBlocks]) -> LoadedBlocks:
    """Blocks that were loaded apart and follow one another, as one model; the parts are used up."""
    first, end = parts[0], parts[-1].end
    layers = nn.ModuleList([layer for part in parts for layer in part.layers])
    hand_over_alike(first.decoder, layers)
    described = source.config()
    restrict_config(described, first.start, end)
    for name, value in described.to_dict().items():
        if isinstance(value, list) and len(value) == len(layers):
            setattr(first.config, name, value)
    first.config.num_hidden_layers = len(layers)  # by whatever name the config has for it
    setattr(first.decoder, first.layers_name, layers)
    return first


def _in_range(name: str, start: int, end: int) -> bool:
    index = block_index(name)
    return index is not None and start <= index < end


def load_edges(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    labels: Sequence[str] = (),
) -> tuple[PreTrainedModel, DecoderInfo]:
    """Load everything but the blocks: embeddings, final norm, head.

    The blocks are there as objects of their own class, with the right names, shapes and dtypes,
    but every parameter and buffer in them is a zero of stride zero, which takes no memory.
    With ``labels`` the model is the family's sequence classifier, else its causal language model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    taken: list[tuple[Trunk, nn.ModuleList, bool]] = []

    def take_blocks_away(model: PreTrainedModel) -> None:
        trunk = find_trunk(model)
        taken.append((trunk, trunk.layers, returns_tuple(model, trunk)))
        trunk.set_layers(nn.ModuleList())

    weights = source.weights()
    wanted = [name for name in weights.names() if block_index(name) is None]
    tensors = weights.lazy(wanted)
    if labels:
        mapping, kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "sequence classifier"
    else:
        mapping, kind = MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model"
    model_class = class_for(source, mapping, kind)
    model = load(
        source,
        model_class,
        take_blocks_away,
        tensors,
        dtype=dtype,
        device=device,
        progress=progress,
        labels=labels,
        describe=without_quantizer if is_float(tensors.items()) else lambda _: None,
    )
    trunk, layers, tuples = taken[0]
    for layer in layers:
        _empty(layer)
    trunk.set_layers(layers.eval())
    generation_config = source.generation_config()
    if generation_config is not None and not labels:
        model.generation_config = generation_config
    size = model.config.hidden_size
    return model, DecoderInfo(trunk.decoder, trunk.layers_name, len(layers), size, tuples)


def _empty(layer: nn.Module) -> None:
    """Put a placeholder of the same shape and dtype in the place of every tensor of `layer`."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                placeholder = nn.Parameter(_placeholder(parameter), requires_grad=False)
                module._parameters[name] = placeholder
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _placeholder(buffer)


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
