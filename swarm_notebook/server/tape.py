"""The operations of a block, as functions for all blocks that consist of the same ones.

What a decoder does in a call of one block comes as an FX graph (`recording`). What depends on
positions alone, as rotations do, is taken out of it: blocks that run one after the other share it.
The products with weights are replaced by the fastest way of the machine (`linear`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from swarm_notebook.server import linear, torchscript
from swarm_notebook.server.alike import named_tensors
from swarm_notebook.server.script import Unrecordable

_LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of a block, by its name, or the copy of it that `linear.packed` takes."""

    name: str
    packed: bool = False


@dataclass(slots=True, eq=False)
class Tape:
    """The operations of a block.

    Attributes:
        ahead: takes position ids and ``constants``, gives what depends on positions alone.
        body: takes hidden states, position ids, what ``ahead`` gives and the tensors of a block
            (`tensors_of`), gives the block's output.
    """

    ahead: Callable[..., tuple[torch.Tensor, ...]]
    body: Callable[..., tuple[torch.Tensor, ...]]
    constants: list[torch.Tensor]
    _wanted: list[torch.Tensor | _Weight]

    def tensors_of(self, layer: nn.Module, products: linear.Products) -> list[torch.Tensor]:
        """What ``body`` takes, for a block that is like the one that was recorded."""
        own = dict(named_tensors(layer))
        found = []
        for wanted in self._wanted:
            if isinstance(wanted, _Weight):
                tensor = own[wanted.name]
                found.append(products.pack(tensor) if wanted.packed else tensor.detach())
            else:
                found.append(wanted)
        return found


def from_graph(
    graph: GraphModule, layer: nn.Module, tokens: int, products: linear.Products
) -> Tape:
    """What a graph does to hidden states and position ids, for blocks like this one.

    Args:
        tokens: how many pass through the block in a call.

    Raises:
        TypeError: it calls something that TorchScript does not.
        Unrecordable: it writes over what other blocks need.
    """
    hidden, ids = (node for node in graph.graph.nodes if node.op == "placeholder")
    (result,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
    wanted = _wanted(graph, layer)
    _quicken(graph, wanted, tokens, products)
    calls = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    calls = [node for node in calls if node not in wanted]
    own = _behind(calls, [hidden, *(n for n, what in wanted.items() if isinstance(what, _Weight))])
    early = [node for node in _behind(calls, [ids]) if node not in own]
    crossing = [node for node in early if any(user in own for user in node.users)]
    shared = [*crossing, ids, *(n for n, what in wanted.items() if isinstance(what, torch.Tensor))]
    _refuse_writes(own, shared)
    before = _needed([node for node in calls if node not in own], crossing)
    ahead, constants = torchscript.function(before, [ids], crossing)
    behind = _needed([node for node in calls if node not in early], [result])
    body, tensors = torchscript.function(behind, [hidden, ids, *crossing], [result])
    fixed = [tensor for node in constants if isinstance(tensor := wanted[node], torch.Tensor)]
    return Tape(ahead, body, fixed, [wanted[node] for node in tensors])


def _wanted(graph: GraphModule, layer: nn.Module) -> dict[Node, torch.Tensor | _Weight]:
    """What the nodes that refer to tensors stand for."""
    names = {_place(tensor): name for name, tensor in named_tensors(layer)}
    found: dict[Node, torch.Tensor | _Weight] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(graph).detach()
            name = names.get(_place(tensor)) if tensor.numel() else None
            found[node] = tensor if name is None else _Weight(name)
    return found


def _place(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _quicken(
    graph: GraphModule,
    wanted: dict[Node, torch.Tensor | _Weight],
    tokens: int,
    products: linear.Products,
) -> None:
    """Multiply by each weight in the fastest way."""
    for node in list(graph.graph.nodes):
        if node.target is not _LINEAR or not isinstance(own := wanted.get(node.args[1]), _Weight):
            continue
        weight = operator.attrgetter(node.args[1].target)(graph)
        node.target = products.way(weight, tokens)
        if node.target is linear.packed:
            with graph.graph.inserting_before(node):
                copy = graph.graph.create_node("get_attr", f"packed_{node.name}")
            wanted[copy] = _Weight(own.name, packed=True)
            node.update_arg(1, copy)


def _behind(calls: Iterable[Node], sources: Iterable[Node]) -> dict[Node, None]:
    """The calls, in their order, to which something of the sources comes."""
    reached = set(sources)
    found: dict[Node, None] = {}
    for node in calls:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            found[node] = None
    return found


def _needed(calls: Sequence[Node], results: Iterable[Node]) -> list[Node]:
    """The calls without which the results would not come out."""
    needed = set(results)
    for node in reversed(calls):
        if node in needed or _writes(node):
            needed.update((node, *node.all_input_nodes))
    return [node for node in calls if node in needed]


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _refuse_writes(calls: Iterable[Node], shared: Iterable[Node]) -> None:
    """Make sure that no call changes what others see, or a view of it."""
    kept: set[Any] = set(shared)
    for node in calls:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, Node) or value not in kept:
                continue
            if argument.alias_info.is_write:
                raise Unrecordable(f"{node.target} writes over what depends on positions alone")
            kept.add(node)
