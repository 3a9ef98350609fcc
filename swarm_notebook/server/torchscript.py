"""Nodes of an FX graph of torch operators as a TorchScript function, which runs without Python.

`torch.jit.trace` and `torch.jit.script` would do, but what they make stays in the process for ever,
with the Python stack of each of its nodes: 4 KB per operation. A function that is put together from
nodes takes a third of that, and goes with its last reference.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

_TENSOR = torch._C.TensorType.get()


def function(
    nodes: Iterable[Node], inputs: Sequence[Node], outputs: Sequence[Node]
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[Node]]:
    """A function that does what some nodes do; also the tensors that it wants as further inputs.

    Args:
        nodes: calls of torch's operators, and of Python functions that `torch.jit.script` takes.
            Whether they turn gradients on or off is not kept: they are for the caller to turn off.
        inputs: what comes from outside, except for the tensors that the graph refers to. (Packed
            weights, see `linear`, cannot be constants of a function.)

    Raises:
        TypeError: they call something else.
    """
    builder = _Builder(inputs)
    for node in nodes:
        builder.add(node)
    builder.give(outputs)
    made = torch._C._create_function_from_graph("forward", builder.graph)
    return made, builder.tensors


class _Builder:
    def __init__(self, inputs: Sequence[Node]):
        # What it has for building graphs is not in its type stubs.
        self.graph: Any = torch._C.Graph()
        # What the graph refers to.
        self.tensors: list[Node] = []
        # A value, or several for an operator that returns a tuple.
        self._values: dict[Node, Any] = {
            node: self.graph.addInput(f"input_{number}") for number, node in enumerate(inputs)
        }

    def add(self, node: Node) -> None:
        """The next node."""
        if node.op != "call_function":
            raise TypeError(f"{node.op} of {node.target} cannot be recorded")
        self._values[node] = self._call(node)

    def give(self, results: Sequence[Node]) -> None:
        """What the function returns."""
        values = [self._values[node] for node in results]
        made = self.graph.insertNode(self.graph.create("prim::TupleConstruct", values, 1)).output()
        made.setType(torch._C.TupleType([_TENSOR for _ in values]))
        self.graph.registerOutput(made)

    def _call(self, node: Node) -> Any:
        target: Any = node.target
        if target is operator.getitem:
            return self._item(*node.args)
        if isinstance(target, torch._ops.OpOverload):
            return self._operator(target, node)
        if target is torch._C._set_grad_enabled:
            return None
        callee = _scripted(target).inlined_graph
        inputs = [self._value(value) for value in node.args]
        missing = len(list(callee.inputs())) - len(inputs)
        inputs += [self.graph.insertConstant(None)] * missing
        (output,) = self.graph.insertGraph(callee, inputs)
        return output

    def _operator(self, target: Any, node: Node) -> Any:
        schema = target._schema
        given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
        given |= node.kwargs
        inputs = [
            self._value(given.get(argument.name, argument.default_value), argument.type)
            for argument in schema.arguments
        ]
        made = self.graph.insertNode(self.graph.create(schema.name, inputs, len(schema.returns)))
        outputs = list(made.outputs())
        for output, returned in zip(outputs, schema.returns, strict=True):
            output.setType(returned.type)
        return outputs[0] if len(outputs) == 1 else outputs

    def _item(self, of: Any, index: Any) -> Any:
        values = self._known(of)
        if isinstance(values, list):
            return values[index]
        inputs = [values, self.graph.insertConstant(index)]
        item = self.graph.insertNode(self.graph.create("aten::__getitem__", inputs, 1)).output()
        item.setType(values.type().getElementType())
        return item

    def _value(self, value: Any, wanted: Any = None) -> Any:
        """An argument of type ``wanted`` in the graph."""
        if isinstance(value, Node):
            return self._known(value)
        if isinstance(wanted, torch._C.OptionalType):
            wanted = wanted.getElementType()
        if isinstance(value, (list, tuple)):
            return self._list(value, wanted.getElementType())
        if isinstance(wanted, torch._C.FloatType) and isinstance(value, int):
            value = float(value)
        return self.graph.insertConstant(value)

    def _list(self, values: Sequence[Any], element: Any) -> Any:
        inputs = [self._value(value, element) for value in values]
        made = self.graph.insertNode(self.graph.create("prim::ListConstruct", inputs, 1)).output()
        made.setType(torch._C.ListType(element))
        return made

    def _known(self, node: Node) -> Any:
        if node.op == "get_attr" and node not in self._values:
            self.tensors.append(node)
            self._values[node] = self.graph.addInput(f"tensor_{len(self.tensors)}")
        return self._values[node]


@functools.cache
def _scripted(function: Callable[..., Any]) -> Any:
    return torch.jit.script(function)
