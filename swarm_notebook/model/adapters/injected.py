"""Finds the adapters that PEFT has put into remote blocks, and notices when they change.

PEFT's modules in a remote block are never run here: they are described (`tuner_layers`), and sent
to the servers (`client.adapters`), which put the same around the real weights; the gradients come
back to the parameters here. So whatever PEFT or its user sets on them counts.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from swarm_notebook.client.adapters import AdaptedBlock, Adapter
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.adapters.trial import try_out
from swarm_notebook.model.adapters.tuner_layers import (
    BlockLayers,
    Weights,
    describe,
    row_options,
    tuners_in,
)
from swarm_notebook.model.blocks.remote import RemoteBlock

# Adapters that are used in turns are remembered, so that each is uploaded once; a server keeps so
# many of one notebook.
_REMEMBERED = 8


class Adapters:
    """The adapters in the blocks of one model.

    Args:
        model: the causal LM; PEFT leaves its configs there as ``peft_config``.

    Attributes:
        injections: how often PEFT has changed the modules of the blocks.
    """

    injections: int

    def __init__(self, model: nn.Module):
        # In a list, so that it is no attribute which copies of the model would follow.
        self._model = [model]
        self.injections = 0
        self._injected: list[int] | None = None
        self._tuners: list[nn.Module] = []
        self._switches: list[Any] = []
        self._tried: set[tuple[Any, ...]] = set()
        self._layers: dict[int, BlockLayers] = {}
        self._parameters: Weights = {}
        self._key = ""
        self._tensors: list[torch.Tensor] = []
        self._states: OrderedDict[str, _State] = OrderedDict()
        self._adapter: Adapter | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        return Adapters(copy.deepcopy(self._model[0], memo))

    @property
    def parameters(self) -> Weights:
        """The parameters of the active adapters by block and by name, as gradients name them."""
        return self._parameters

    @property
    def trains(self) -> bool:
        """Whether any of them wants a gradient."""
        return bool(self._parameters)

    def forget(self) -> None:
        """Look for the adapters anew: blocks came home, or went."""
        self._injected = None

    def current(self, blocks: Sequence[nn.Module], *, thorough: bool) -> Adapter | None:
        """The present state of the active adapters; None if there are none.

        Args:
            thorough: look at everything. Otherwise a change is noticed by which adapters are
                active, by their scalings, and by torch's version counters, which changes through
                ``.data`` do not move.

        Raises:
            Unsupported: PEFT keeps or does something that servers cannot.
        """
        configs: dict[str, Any] = getattr(self._model[0], "peft_config", None) or {}
        if not configs and not self._tuners:
            return None
        remote = {
            index: block for index, block in enumerate(blocks) if isinstance(block, RemoteBlock)
        }
        injected = [id(config) for config in configs.values()]
        anew = injected != self._injected
        if anew:
            self.injections += 1
            self._injected = injected
        if anew or thorough:
            self._tuners = [tuner for block in remote.values() for _, tuner in tuners_in(block)]
        if not self._tuners:
            self._layers, self._parameters, self._adapter = {}, {}, None
            return None
        by_row = row_options(self._tuners)
        switches = [_switches(tuner) for tuner in self._tuners] + [sorted(by_row)]
        if anew or thorough or switches != self._switches:
            self._describe(remote, configs.keys(), by_row)
            self._switches = switches
        if not self._layers:
            return None
        adapter = self._state(thorough)
        return replace(adapter, by_row=by_row) if by_row else adapter

    def dropout_seed(self, blocks: Sequence[nn.Module]) -> int | None:
        """A seed for the dropout of the active adapters, drawn as torch draws; None for none."""
        random = any(layers.random for layers in self._layers.values())
        if not random or not self._tuners[0].training:
            return None
        return int(torch.randint(2**31, ()))

    def _describe(
        self, blocks: Mapping[int, nn.Module], known: Any, by_row: Mapping[str, list[Any]]
    ) -> None:
        """Read off the layers of the adapters that take part."""
        wanted = {name for name in by_row.get("adapter_names", ()) if name != "__base__"}
        tuner: Any
        for tuner in self._tuners:
            if tuner.merged:
                raise Unsupported(
                    "merged adapters: the weights that they were merged into are not on the "
                    "servers; unmerge them, or bring the blocks home: swarm.own(slice(None))"
                )
            wanted.update(tuner.active_adapters)
        self._try_out(blocks)
        adapters = {*known, *wanted}
        found = {index: describe(block, index, adapters, wanted) for index, block in blocks.items()}
        self._layers = {index: layers for index, layers in found.items() if layers is not None}
        self._parameters = {
            index: {f"{index}.{name}": layers.tensors[name] for name in sorted(layers.trained)}  # type: ignore[misc]
            for index, layers in self._layers.items()
            if layers.trained
        }
        told = [(index, one.text, sorted(one.trained)) for index, one in self._layers.items()]
        self._key, self._tensors = json.dumps(told), _distinct(self._layers)

    def _try_out(self, blocks: Mapping[int, nn.Module]) -> None:
        """Judge what was not judged yet; one block stands for all others with the same layers."""
        for index, block in blocks.items():
            tuner: Any
            for path, tuner in tuners_in(block):
                key = type(tuner), path, tuple(tuner.active_adapters), tuner.base_layer.__class__
                if key not in self._tried and not tuner.disable_adapters:
                    try_out(tuner, index, path)
                    self._tried.add(key)

    def _state(self, thorough: bool) -> Adapter:
        """The present weights, copied if they have changed."""
        key, tensors = self._key, self._tensors
        state = self._states.pop(key, None)
        if state is None or state.changed(tensors, thorough):
            state = _State(_copied(self._layers, state.adapter if state else None), tensors)
        self._states[key] = state
        while len(self._states) > _REMEMBERED:
            self._states.popitem(last=False)
        return state.adapter


class _State:
    """A state of adapters, and by what a later change is to be noticed."""

    def __init__(self, adapter: Adapter, tensors: Sequence[torch.Tensor]):
        self.adapter = adapter
        self._versions = _versions(tensors)
        self._checksums = [_checksum(one) for one in tensors]

    def changed(self, tensors: Sequence[torch.Tensor], thorough: bool) -> bool:
        """Whether values are not what they were."""
        if self._versions != _versions(tensors):
            return True
        return thorough and self._checksums != [_checksum(one) for one in tensors]


def _versions(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [(one.data_ptr(), one._version) for one in tensors]


def _distinct(layers: Mapping[int, BlockLayers]) -> list[torch.Tensor]:
    """The tensors, each once."""
    found = {id(one): one for block in layers.values() for one in block.tensors.values()}
    return list(found.values())


def _copied(layers: Mapping[int, BlockLayers], before: Adapter | None) -> Adapter:
    """A state with values of its own; those that several blocks share stay one tensor."""
    copies = {id(one): one.detach().cpu().clone().contiguous() for one in _distinct(layers)}
    return Adapter(
        id=before.id if before else str(uuid.uuid4()),
        version=before.version + 1 if before else 1,
        peft=importlib.metadata.version("peft"),
        blocks={
            index: AdaptedBlock(
                block.text,
                {name: copies[id(one)] for name, one in block.tensors.items()},
                block.trained,
            )
            for index, block in layers.items()
        },
    )


def _switches(tuner: Any) -> tuple[Any, ...]:
    """What people switch on a layer from one call to the next."""
    scaling = getattr(tuner, "scaling", None)
    scales = tuple(scaling.values()) if isinstance(scaling, dict) else scaling
    return tuner.disable_adapters, tuple(tuner.active_adapters), scales


def _checksum(tensor: torch.Tensor) -> int:
    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(raw.numpy().data)
