"""Finds the adapters that PEFT has put into remote blocks, and notices when they change.

PEFT's modules in a remote block are never run here: their parameters are read, sent to the
servers (client.adapters) and get their gradients back. What PEFT configures beyond parameters
travels as its own config, and the server lets PEFT build the same modules around the real weights.
"""

from __future__ import annotations

import copy
import json
import math
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.connection import Connection
from swarm_notebook.errors import Unsupported
from swarm_notebook.model.autograd import Weights
from swarm_notebook.model.blocks import RemoteBlock
from swarm_notebook.model.placeholders import is_placeholder

# DoRA's magnitudes begin as the norms of the base weights, which PEFT took of placeholders here.
_DERIVED = "lora_magnitude_vector"


class Adapters:
    """The adapters in the blocks of one model.

    Args:
        model: the causal LM; PEFT leaves its configs there as ``peft_config``.
        prefix: name of the list of blocks in it.

    Attributes:
        injections: how often PEFT has changed the modules of the blocks.
    """

    def __init__(self, connection: Connection, model: nn.Module, prefix: str):
        self._connection, self._prefix = connection, prefix
        # In a list, so that it is no attribute which copies of the model would follow.
        self._model = [model]
        self.injections = 0
        self._injected: list[int] = []
        self._tuned: list[nn.Module] = []
        self._active: tuple[str, ...] = ()
        self._parameters: Weights = {}
        self._adapter: Adapter | None = None
        self._versions: list[tuple[int, int]] = []
        self._checksums: list[int] = []

    def __deepcopy__(self, memo: dict) -> Adapters:
        return Adapters(self._connection, copy.deepcopy(self._model[0], memo), self._prefix)

    @property
    def parameters(self) -> Weights:
        """The parameters of the active adapters by block and by name in the model."""
        return self._parameters

    @property
    def trains(self) -> bool:
        """Whether any of them wants a gradient."""
        return any(
            parameter.requires_grad
            for named in self._parameters.values()
            for parameter in named.values()
        )

    def forget(self) -> None:
        """Look for the adapters anew: blocks came home, or went."""
        self._injected = []
        self.injections += 1

    def current(self, blocks: Sequence[nn.Module], *, thorough: bool) -> Adapter | None:
        """The present state of the active adapters; None if there are none.

        Args:
            thorough: compare the weights' bytes, too. Otherwise a change is noticed by torch's
                version counters, which changes through ``.data`` do not move.
        """
        configs: dict[str, Any] = getattr(self._model[0], "peft_config", None) or {}
        if not configs and not self._parameters:
            return None
        remote = {
            index: block for index, block in enumerate(blocks) if isinstance(block, RemoteBlock)
        }
        injected = [id(config) for config in configs.values()]
        if injected != self._injected:
            self.injections += 1
            self._injected, self._tuned, self._active = injected, _tuned_modules(remote), ()
            self._parameters = {}
        if thorough:
            self._check_state(configs)
        active = self._switched_on(configs)
        if active != self._active or not self._parameters:
            self._active, self._adapter = active, None
            self._collect(remote, configs)
        if self._parameters and self._changed(thorough):
            self._adapter = self._state(configs)
            self._note()
        return self._adapter

    def dropout_seed(self, blocks: Sequence[nn.Module]) -> int | None:
        """A seed for the dropout of the active adapters, drawn as torch draws; None for none."""
        if not self._active or not blocks[0].training:
            return None
        configs: dict[str, Any] = self._model[0].peft_config  # type: ignore[assignment]
        if not any(getattr(configs[name], "lora_dropout", 0) for name in self._active):
            return None
        return int(torch.randint(2**31, ()))

    def _switched_on(self, configs: dict[str, Any]) -> tuple[str, ...]:
        """Names of the active adapters; all modules are switched alike, so one is asked."""
        if not self._tuned:
            return ()
        first: Any = self._tuned[0]
        if first.disable_adapters:
            return ()
        return tuple(name for name in first.active_adapters if name in configs)

    def _check_state(self, configs: dict[str, Any]) -> None:
        """Refuse what PEFT keeps in its modules and the servers do not know.

        Raises:
            Unsupported: an adapter is switched or scaled in some modules only, or merged.
        """
        switches = set()
        for module in self._tuned:
            tuner: Any = module
            if tuner.merged:
                raise Unsupported(
                    "merge_adapter: the weights to merge into are on the servers; keep the adapter "
                    "unmerged, or bring the blocks home: swarm.own(slice(None))"
                )
            switches.add((tuner.disable_adapters, tuple(tuner.active_adapters)))
            for name in configs.keys() & getattr(tuner, "scaling", {}).keys():
                if not math.isclose(tuner.scaling[name], _scaling(tuner, name, configs[name])):
                    raise Unsupported(
                        f"the scaling of adapter {name!r} in remote blocks is what its config says "
                        "(lora_alpha and r); multiply its lora_B weights instead, or bring the "
                        "blocks home: swarm.own(slice(None))"
                    )
        if len(switches) > 1:
            raise Unsupported(
                "adapters in remote blocks are on or off in all modules alike; switch them with "
                "the PEFT model (set_adapter, disable_adapter), or bring the blocks home: "
                "swarm.own(slice(None))"
            )

    def _collect(self, blocks: Mapping[int, nn.Module], configs: dict[str, Any]) -> None:
        """Find the parameters of the active adapters in remote blocks."""
        from peft.utils import ModulesToSaveWrapper

        found: dict[int, dict[str, nn.Parameter]] = {}
        for index, block in blocks.items():
            if any(isinstance(module, ModulesToSaveWrapper) for module in block.modules()):
                raise Unsupported(
                    f"modules_to_save inside block {index}: its weights are on the servers; "
                    "name modules outside of the blocks (the head), or tune it with LoRA"
                )
            named = {
                f"{self._prefix}.{index}.{name}": parameter
                for name, parameter in block.named_parameters()
                if not is_placeholder(parameter) and set(self._active) & set(name.split("."))
            }
            if named:
                found[index] = named
        self._parameters = found

    def _all(self) -> list[nn.Parameter]:
        return [parameter for named in self._parameters.values() for parameter in named.values()]

    def _note(self) -> None:
        """Remember by what a later change is to be noticed."""
        self._versions = [(one.data_ptr(), one._version) for one in self._all()]
        self._checksums = [_checksum(one) for one in self._all()]

    def _changed(self, thorough: bool) -> bool:
        if self._adapter is None:
            return True
        if self._versions != [(one.data_ptr(), one._version) for one in self._all()]:
            return True
        return thorough and self._checksums != [_checksum(one) for one in self._all()]

    def _state(self, configs: dict[str, Any]) -> Adapter:
        """The present weights, copied; a first one lets the servers fill in what only they can."""
        before = self._adapter
        adapter = Adapter(
            id=before.id if before else str(uuid.uuid4()),
            version=before.version + 1 if before else 1,
            configs={name: _config_json(configs[name]) for name in self._active},
            prefix=self._prefix,
            weights={
                block: {name: value.detach().cpu().clone() for name, value in named.items()}
                for block, named in self._parameters.items()
            },
            derived=frozenset(
                name
                for named in self._parameters.values()
                for name, parameter in named.items()
                if _DERIVED in name and not parameter.detach().any()
            ),
        )
        if adapter.derived:
            derived = self._connection.derive(adapter)
            with torch.no_grad():
                for named in self._parameters.values():
                    for name in adapter.derived & named.keys():
                        named[name].copy_(derived[name])
            self._adapter = adapter
            return self._state(configs)
        return adapter


def _tuned_modules(blocks: Mapping[int, nn.Module]) -> list[nn.Module]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        module
        for block in blocks.values()
        for module in block.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _scaling(tuner: Any, name: str, config: Any) -> float:
    """What PEFT makes of a config."""
    rank = tuner.r[name]
    return float(tuner.lora_alpha[name] / (math.sqrt(rank) if config.use_rslora else rank))


def _checksum(tensor: torch.Tensor) -> int:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8)
    return zlib.crc32(raw.numpy().data)


def _config_json(config: Any) -> str:
    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    return json.dumps(config.to_dict(), default=plain)
