"""Parameters inside of remote blocks: a shape that costs nothing, values that are read when asked.

A `RemoteParameter` is a zero-stride view of one zero on a real device (so that PEFT puts real
adapter weights beside it), which torch asks about every operation. What needs no values (shape,
dtype, device, new tensors like it) works on the view. A conversion gives another of its kind. What
reads values gets the real ones, read from the checkpoint for this one operation. What would write
is refused, also by way of a row or another view that was read: the weights that count are on the
servers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from swarm_notebook.errors import Unsupported


@dataclass(frozen=True)
class Origin:
    """Where the values of a tensor are.

    Attributes:
        block: the block that it is in.
        name: its name in the block.
        read: reads it, given block and name.
        owner: the module that is the block.
    """

    block: int
    name: str
    read: Callable[[int, str], torch.Tensor]
    owner: weakref.ref[nn.Module]


class RemoteTensor(torch.Tensor):
    """A tensor in a remote block, or a conversion of one."""

    _origin: Origin

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COSTLESS:
            return _as_it_is(func, args, kwargs)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if func in _CONVERSIONS and isinstance(first, RemoteTensor):
            return _converted(func, first, args, kwargs)
        if func == torch.Tensor.is_contiguous:
            return True
        if func == _SET_DATA and isinstance(args[1], RemoteTensor) and _same(first, args[1]):
            return _as_it_is(func, args, kwargs)
        if func in _SWITCHES:
            wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
            if wanted:
                _refuse(first, "requires_grad")
            result = _as_it_is(func, args, kwargs)
            if isinstance(first, Detached):
                first.__class__ = RemoteParameter  # type: ignore[assignment]
            return result
        _refuse_write(func, first, kwargs)
        return _read(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        owner = self._origin.owner()
        if id(owner) not in memo:
            # A part of a block that is copied by itself (PEFT trains such copies) has values.
            values = _real(self).detach().clone()
            copied = nn.Parameter(values) if isinstance(self, nn.Parameter) else values
            memo[id(self)] = copied
            return copied
        origin = replace(self._origin, owner=weakref.ref(memo[id(owner)]))
        with torch._C.DisableTorchFunctionSubclass():
            twin = _wrap(type(self), _bare(self).clone(), self.shape, origin)
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> RemoteTensor:
        with torch._C.DisableTorchFunctionSubclass():
            return _wrap(type(self), _bare(self).clone(), self.shape, self._origin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _real(self).__reduce_ex__(protocol)


class RemoteParameter(RemoteTensor, nn.Parameter):
    """A parameter of a remote block."""


class Detached(RemoteTensor):
    """Such a parameter, detached.

    ``nn.Parameter(…)``, of which parametrizations make what they keep, wants it to be of the
    parameter's kind after ``requires_grad_``.
    """


class ReadView(torch.Tensor):
    """A view of values that were read: what is written to it would reach no server."""

    _origin: Origin

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COSTLESS or func in _SWITCHES:
            return _as_it_is(func, args, kwargs)
        _refuse_write(func, args[0] if args else next(iter(kwargs.values()), None), kwargs)
        return _read(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = copy.deepcopy(_real(self), memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _real(self).__reduce_ex__(protocol)


def remote_buffer(tensor: torch.Tensor, origin: Origin) -> RemoteTensor:
    """A tensor of the shape, dtype and device of another one, with its values at an origin."""
    zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
    made: RemoteTensor = _wrap(RemoteTensor, zero, tensor.shape, origin)
    return made


def make_real(parameter: RemoteParameter, values: torch.Tensor) -> None:
    """Turn it into an ordinary parameter, in place: whoever holds it has the values then."""
    plain: Any = parameter
    del plain._origin
    plain.__class__ = nn.Parameter
    plain.data = values


def make_remote(parameter: nn.Parameter, origin: Origin) -> None:
    """Turn an ordinary parameter into one without values, in place."""
    plain: Any = parameter
    plain.requires_grad_(False)
    plain.grad = None
    zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
    plain.data = zero.expand(parameter.shape)
    plain.__class__ = RemoteParameter
    plain._origin = origin


def _wrap(kind: type, zero: torch.Tensor, shape: torch.Size, origin: Origin) -> Any:
    made: Any = torch.Tensor._make_subclass(kind, zero.expand(shape), False)
    made._origin = origin
    return made


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """The one zero behind it."""
    return tensor.detach().as_strided((), ())


def _as_it_is(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function makes of the view, which asks us no more."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _refuse_write(func: Any, first: Any, kwargs: dict[str, Any]) -> None:
    written = kwargs.get("out", first if _writes(func) else None)
    for target in written if isinstance(written, (list, tuple)) else (written,):
        if isinstance(target, (RemoteTensor, ReadView)):
            _refuse(target, getattr(func, "__name__", "a write"))


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function makes of the real values."""
    origins: dict[int, Origin] = {}

    def real(value: Any) -> Any:
        found = _real(value)
        if found is not value:
            origins[found.untyped_storage().data_ptr()] = value._origin
        return found

    def guarded(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return value
        origin = origins.get(value.untyped_storage().data_ptr())
        if origin is None or value.is_meta:
            return value
        view: Any = value.as_subclass(ReadView)
        view._origin = origin
        return view

    with torch._C.DisableTorchFunctionSubclass():
        result = func(*tree_map(real, args), **tree_map(real, kwargs))
        if func is _TENSOR.__iter__:
            return iter([guarded(row) for row in result])
        return tree_map(guarded, result)


def _real(value: Any) -> Any:
    if isinstance(value, ReadView):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)
    if not isinstance(value, RemoteTensor):
        return value
    origin = value._origin
    found = origin.read(origin.block, origin.name)
    with torch._C.DisableTorchFunctionSubclass():
        return found.to(value.device, value.dtype)


def _converted(
    func: Any, tensor: RemoteTensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        rest = args[1:]
        result = func(_bare(tensor), *rest, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        of_parameter = func in _DETACHING and isinstance(tensor, RemoteParameter)
        kind = Detached if of_parameter else RemoteTensor
        return _wrap(kind, result, tensor.shape, tensor._origin)


def _same(one: Any, other: RemoteTensor) -> bool:
    return one._origin == other._origin and one.shape == other.shape


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__set__", "__setitem__", "__setstate__"):
        return True
    if name.startswith("__"):
        return name in _IN_PLACE
    return name.endswith("_")


def _refuse(tensor: Any, what: str) -> NoReturn:
    origin = tensor._origin
    what = {"__set__": "setting it", "requires_grad": "requires_grad=True"}.get(what, what)
    raise Unsupported(
        f"{what}: {origin.name} of block {origin.block} is on the servers and cannot be changed or "
        "trained from here; train the block with a PEFT adapter, change a clone() for yourself, or "
        f"bring the block home: swarm.own({origin.block})"
    )


_TENSOR: Any = torch.Tensor
_SET_DATA = _TENSOR.data.__set__
_SWITCHES = (_TENSOR.requires_grad_, _TENSOR.requires_grad.__set__)
_OPERATORS = "add sub mul truediv floordiv mod pow and or xor lshift rshift"
_IN_PLACE = frozenset(f"__i{name}__" for name in _OPERATORS.split())
_DETACHING = (_TENSOR.detach, torch.detach)
_CONVERTERS = "to cpu cuda float double half bfloat16 type detach contiguous"
_CONVERSIONS = frozenset(
    [
        _TENSOR.data.__get__,
        torch.detach,
        *(getattr(torch.Tensor, name) for name in _CONVERTERS.split()),
    ]
)
_PROPERTIES = (
    "_base _version device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mps is_nested "
    "is_quantized is_sparse is_xpu itemsize layout name names nbytes ndim output_nr requires_grad "
    "retains_grad shape volatile"
)
_METHODS = (
    "__hash__ __len__ _is_view backward data_ptr dim element_size get_device is_complex "
    "is_floating_point is_inference is_pinned is_same_size is_shared is_signed ndimension "
    "nelement new_empty new_full new_ones new_zeros numel register_hook retain_grad size stride "
    "storage storage_offset untyped_storage _typed_storage "
    "register_post_accumulate_grad_hook"
)
_FUNCTIONS = (
    "_has_compatible_shallow_copy_type empty_like full_like is_complex is_floating_point "
    "is_same_size numel ones_like rand_like randint_like randn_like result_type zeros_like"
)
_COSTLESS = frozenset(
    [
        *(
            getattr(torch.Tensor, name).__get__
            for name in _PROPERTIES.split()
            if hasattr(torch.Tensor, name)
        ),
        _TENSOR.grad.__set__,
        *(getattr(torch.Tensor, name) for name in _METHODS.split() if hasattr(torch.Tensor, name)),
        *(getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)),
    ]
)


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are elsewhere."""
    return isinstance(tensor, RemoteTensor)
