"""Adapters of notebooks, as PEFT itself builds them around the real weights.

For each adapter the hosted blocks are cloned: modules of their own, which share every base
parameter and buffer with the originals, under the names that they have in the notebook's model.
PEFT injects its modules into the clones on the meta device (no memory, no initialisation); if the
names and shapes are exactly those of the upload, the uploaded values take their place. So those
without an adapter run the originals, as if there were none. Steps of sessions with different
adapters can share a call of the originals (`mixing`), if their layers allow it.

Parameters may be missing on purpose (``derive``): DoRA's magnitudes begin as norms of the base
weights, which a notebook does not have.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.errors import BadRequest
from swarm_notebook.server.adapters.config import TUNERS, TunerConfig
from swarm_notebook.server.adapters.mixing import Site, Tuners
from swarm_notebook.server.engine.span import Span

if TYPE_CHECKING:
    from swarm_notebook.server.adapters.upload import Upload

# Bytes of a module besides its parameters: an empty one takes 2 kB (measured with tracemalloc), and
# those of PEFT have more attributes.
MODULE_BYTES = 3 << 10

_MAGNITUDE = ".lora_magnitude_vector."
# A prime above the number of blocks of any model: no two pairs of seed and block are the same.
_SEED_STEP = 1_000_003
# While PEFT injects, whatever registers a parameter does so on meta, in all threads of the process:
# those of other servers in it have to wait.
_on_meta = threading.Lock()
# PEFT draws its dropout from torch's generator, of which a process has one: servers that share the
# process take turns.
_GENERATOR = threading.Lock()


class AdaptedSpan(Span):
    """Blocks of a span with an adapter in them.

    Args:
        token_wise: the modules of ``base`` around which layers of adapters can be mixed in.
    """

    def __init__(self, base: Span, upload: Upload, token_wise: AbstractSet[Site] = frozenset()):
        start, end = upload.recipe.blocks
        self._tree, layers = _cloned(base, start, end, upload.recipe.prefix)
        super().__init__(base.decoder_around(start, layers), base.layers_name, start)
        frozen = {id(parameter) for parameter in self._tree.parameters()}
        self._dropouts = _inject(self._tree, upload)
        self.recipe, self._base = upload.recipe, base
        tuners = _tuners(self.layers, start)
        mixes = token_wise >= tuners.keys() and all(map(_is_beside, tuners.values()))
        self._mixed = tuners if mixes else None
        self._parameters = {
            name: parameter
            for name, parameter in self._tree.named_parameters()
            if id(parameter) not in frozen
        }

    @property
    def host(self) -> Span:
        return self if self._mixed is None else self._base

    @property
    def tuners(self) -> Tuners:
        return self._mixed or {}

    @property
    def storages(self) -> frozenset[int]:
        own = (weight.untyped_storage().data_ptr() for weight in self._parameters.values())
        return self._base.storages.union(own)

    @property
    def size(self) -> int:
        """The bytes that this adapter takes."""
        weights = sum(weight.numel() * weight.itemsize for weight in self._parameters.values())
        return weights + MODULE_BYTES * sum(1 for _ in self._tree.modules())

    @property
    def names(self) -> frozenset[str]:
        """The names of its parameters."""
        return frozenset(self._parameters)

    def check(self, upload: Upload) -> None:
        """Refuse an upload whose parameters are not exactly those of the modules."""
        uploaded, derived = upload.tensors.keys(), set(upload.derive)
        both = uploaded & derived
        missing = self._parameters.keys() - uploaded - derived
        unknown = (uploaded | derived) - self._parameters.keys()
        for names, what in ((missing, "missing"), (unknown, "unknown"), (both, "uploaded")):
            if names:
                raise BadRequest(
                    f"adapter parameters: {len(names)} {what}, such as {min(names)[:200]!r}"
                )
        for name in derived:
            if _MAGNITUDE not in name:
                raise BadRequest(f"derive: {name[:200]!r} cannot be derived from the base weights")
        for name, tensor in upload.tensors.items():
            expected = self._parameters[name].shape
            if tensor.shape != expected:
                raise BadRequest(
                    f"{name}: shape {list(tensor.shape)}, expected {list(expected)} by its config"
                )

    @torch.no_grad()
    def load(self, upload: Upload) -> dict[str, torch.Tensor]:
        """Take over the values of an upload that `check` has passed.

        Returns:
            the parameters that were derived.
        """
        for name, tensor in upload.tensors.items():
            self._set(name, tensor)
        derived = {name: self._magnitude(name) for name in sorted(upload.derive)}
        for name, tensor in derived.items():
            self._set(name, tensor)
        return derived

    def adapter_weights(self, start: int, end: int) -> dict[str, nn.Parameter]:
        prefixes = tuple(f"{self.recipe.prefix}.{index}." for index in range(start, end))
        return {
            name: parameter
            for name, parameter in self._parameters.items()
            if name.startswith(prefixes)
        }

    def compute(
        self, start: int, end: int, hidden: torch.Tensor, *, seed: int | None = None, **options: Any
    ) -> list[torch.Tensor]:
        """`Span.compute`, with dropout in the adapter if there is a ``seed``."""
        if seed is None:
            return super().compute(start, end, hidden, **options)
        with self._dropping(start, end, seed):
            return super().compute(start, end, hidden, **options)

    @contextmanager
    def _dropping(self, start: int, end: int, seed: int) -> Iterator[None]:
        """Masks follow from seed and block, on whichever server and in whichever run of blocks."""

        def begin(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                torch.manual_seed(seed * _SEED_STEP + index)

            return hook

        devices = [self.device] if self.device.type == "cuda" else []
        with _GENERATOR, ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            for index in range(start, end):
                handle = self.layer(index).register_forward_pre_hook(begin(index))
                stack.callback(handle.remove)
            for module in self._dropouts:
                module.training = True
                stack.callback(setattr, module, "training", False)
            yield

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        parameter = self._parameters[name]
        if parameter.device == self.device and parameter.dtype == tensor.dtype:
            parameter.copy_(tensor)
            return
        owner, _, leaf = name.rpartition(".")
        # Copied: the bytes of the upload go away.
        owned = nn.Parameter(tensor.to(self.device, copy=True))
        self._tree.get_submodule(owner)._parameters[leaf] = owned
        self._parameters[name] = owned

    def _magnitude(self, name: str) -> torch.Tensor:
        """What PEFT begins DoRA's magnitudes with: the norms of the weights with the adapter."""
        path, _, rest = name.partition(_MAGNITUDE)
        adapter = rest.split(".")[0]
        layer: Any = self._tree.get_submodule(path)
        low_rank = layer.lora_A[adapter].weight
        vector = layer.lora_magnitude_vector[adapter]
        before = vector.weight
        with _on_meta:
            vector.update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=low_rank,
                lora_B=layer.lora_B[adapter].weight,
                scaling=layer.scaling[adapter],
            )
        magnitude, vector.weight = vector.weight.detach(), before
        return magnitude.to(low_rank.dtype)


def _cloned(base: Span, start: int, end: int, prefix: str) -> tuple[nn.Module, list[nn.Module]]:
    """Clones of blocks in a tree with the notebook's names, and as a list."""
    layers = [_clone(base.layer(index)) for index in range(start, end)]
    *parents, last = prefix.split(".")
    tree = owner = nn.Module()
    for name in parents:
        owner.add_module(name, child := nn.Module())
        owner = child
    numbered = {str(start + offset): layer for offset, layer in enumerate(layers)}
    owner.add_module(last, nn.ModuleDict(numbered))
    return tree, layers


def _clone(layer: nn.Module) -> nn.Module:
    """New modules with the same parameters, buffers and config."""
    from transformers import PreTrainedConfig

    shared: list[Any] = [*layer.parameters(), *layer.buffers()]
    for module in layer.modules():
        shared += [value for value in vars(module).values() if isinstance(value, PreTrainedConfig)]
    return copy.deepcopy(layer, {id(value): value for value in shared})


def _inject(tree: nn.Module, upload: Upload) -> list[nn.Module]:
    """Let PEFT put its modules in; returns those that are in training mode during training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    with _on_meta:
        for config in upload.recipe.configs:
            _inject_one(tree, config, upload)
    tree.eval()
    names = [config.name for config in upload.recipe.configs]
    found: list[nn.Module] = []
    for layer in tree.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(names)
            found.append(layer)
            for name, child in layer.named_children():
                if name != "base_layer":
                    found += child.modules()
    return found


def _tuners(layers: Sequence[nn.Module], start: int) -> Tuners:
    """The layers that PEFT has put in, by what they are around."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        (start + offset, name): layer
        for offset, block in enumerate(layers)
        for name, layer in block.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def _is_beside(layer: nn.Module) -> bool:
    """Whether a layer adds to what its module gives, token by token (see `mixing`).

    Those around a bare parameter change the parameter instead.
    """
    from peft.tuners import ia3, loha, lokr, lora

    return isinstance(layer, (lora.Linear, ia3.Linear, loha.Linear, lokr.Linear))


def _inject_one(tree: nn.Module, config: TunerConfig, upload: Upload) -> None:
    from peft import inject_adapter_in_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    marker = f".{TUNERS[config.kind].prefix}"
    targets = {
        name.rpartition(marker)[0].replace(".base_layer", "")
        for name in (*upload.tensors, *upload.derive)
        if marker in name and config.name in name.rpartition(marker)[2].split(".")
    }
    if not targets:
        return  # this adapter tunes other blocks
    modules = dict(tree.named_modules())
    if unknown := targets - modules.keys():
        raise BadRequest(f"adapter parameters: there is no module {min(unknown)[:200]!r}")
    values = dict(config.values)
    if bare := _suffixes(values.get("target_parameters") or ()):
        # Here PEFT wraps the module that owns the parameter, whatever it is.
        targets -= {
            name
            for name in targets
            for parameter, _ in modules[name].named_parameters(recurse=False)
            if f"{name}.{parameter}".endswith(bare)
        }
    if isinstance(feedforward := values.get("feedforward_modules"), list):
        values["feedforward_modules"] = [
            name for name in targets if name in feedforward or name.endswith(_suffixes(feedforward))
        ]
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[config.kind]
    try:
        settings = kind(target_modules=sorted(targets), **values)
        inject_adapter_in_model(settings, tree, config.name, low_cpu_mem_usage=True)
    except Exception as error:  # whatever PEFT raises, the upload is what it does not like
        raise BadRequest(f"config of {config.name!r}: PEFT says {error}") from error


def _suffixes(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)
