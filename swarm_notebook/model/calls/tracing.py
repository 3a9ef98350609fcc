"""What a trace of nnsight asks of modules inside of a remote block.

nnsight puts a controller in the place of every module's ``forward``; it hands the module's input
and output to whoever waits for them. Modules inside of a remote block are never called here, so
nobody would get anything. Whoever waits for the *output* of one gets what its server captures; all
else inside of a block is refused. Every visit is counted, as nnsight tells steps of a generation
apart by it.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from swarm_notebook.errors import Unsupported

_KINDS = ("input", "skip", "output")


class BlockTrace:
    """A trace that is running, as it concerns the inside of one block."""

    def __init__(self, block: nn.Module, interleaver: Any, path: str):
        self._interleaver, self._prefix = interleaver, f"{path}."
        self._modules = dict(block.named_modules())
        self._served: set[str] = set()

    @classmethod
    def of(cls, block: nn.Module) -> BlockTrace | None:
        """The trace that is running around a block, if there is one."""
        controller: Any = block.__dict__.get("forward")
        if not type(controller).__module__.startswith("nnsight."):
            return None
        interleaver, path, _ = controller.state.active()
        if interleaver is None or not interleaver.busy:
            return None
        return cls(block, interleaver, path)

    def asked(self) -> list[tuple[str, nn.Module]]:
        """Modules whose output somebody waits for now.

        Raises:
            Unsupported: somebody waits for something else inside of the block.
        """
        for location in self._interleaver.observers:
            if self._module(location) is not None:
                self._refuse(location, "tracer.cache")
        found = []
        for location in sorted(self._interleaver.parked):
            # What was served waits for the next visit.
            if not self._inside(location) or location in self._served:
                continue
            if not self._interleaver._ready(location):
                continue
            name = self._module(location)
            if name is None or not location.endswith(".output"):
                self._refuse(location, "a trace")
            found.append((name, self._modules[name]))
        return found

    def serve(self, name: str, output: Any) -> None:
        """Hand out a module's output.

        Raises:
            Unsupported: it was changed.
        """
        location = f"{self._prefix}{name}.output"
        tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
        version = tensor._version
        given = self._interleaver.handle(location, output)
        self._served.add(location)
        if given is not output or tensor._version != version:
            raise Unsupported(
                f"a trace writes to {location}; modules inside a remote block can be read, not "
                "written: write to the block's own output, or bring it home: swarm.own(block)"
            )

    def pass_by(self) -> None:
        """Count the visit of all modules that nobody waited for."""
        counts = self._interleaver.counts
        for name in self._modules:
            for kind in _KINDS if name else ():
                location = f"{self._prefix}{name}.{kind}"
                if location not in self._served:
                    counts[location] = counts.get(location, 0) + 1

    def _inside(self, location: str) -> bool:
        own = location.removeprefix(self._prefix) in _KINDS
        return location.startswith(self._prefix) and not own

    def _module(self, location: str) -> str | None:
        """The module inside of the block whose input or output this is."""
        name, _, kind = location.removeprefix(self._prefix).rpartition(".")
        known = self._inside(location) and name in self._modules and kind in _KINDS
        return name if known else None

    def _refuse(self, location: str, who: str) -> NoReturn:
        raise Unsupported(
            f"{who} asks for {location}; from inside a remote block, servers send only outputs "
            "of modules that are named individually (layers[1].mlp.output): name blocks instead "
            "(tracer.cache(modules=[…])), or bring the block home: swarm.own(block)"
        )
