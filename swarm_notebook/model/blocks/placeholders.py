"""Parameters inside of remote blocks: a shape that costs nothing, values that are read when asked.

A `RemoteParameter` has no memory behind it, and says that it is on a real device (so that PEFT puts
real adapter weights beside it). Torch asks it about every operation. What needs no values (shape,
dtype, device, new tensors like it) works as ever. A conversion gives another of its kind, which
remembers what it was converted to, for each step rounds. What reads values gets the real ones, read
from the checkpoint for this one operation. What would write is refused, also by way of a row or
another view that was read: the weights that count are on the servers. What looks for its memory
finds none and raises.
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
    """A tensor in a remote block, or a conversion of one.

    Attributes:
        _dtypes: what its values were converted to, one after the other.
        _memory: of its dtype and device, and of no size.
    """

    _origin: Origin
    _device: torch.device
    _dtypes: tuple[torch.dtype, ...]
    _memory: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)
        answer = _ANSWERS.get(func)
        if answer is not None and (answer is not _converted or isinstance(first, RemoteTensor)):
            return answer(func, first, args, kwargs)
        _refuse_write(func, first, kwargs)
        return _read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch does with it in C++: ``torch.tensor(weight)``, `torch.func`, traces."""
        if func is torch.ops.prim.device.default:
            return args[0]._device
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_out or (argument.alias_info and argument.alias_info.is_write):
                _refuse_writes_to(value, func.overloadpacket.__name__)
        return func(*tree_map(_real, args), **tree_map(_real, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        owner = self._origin.owner()
        if id(owner) not in memo:
            # A part of a block that is copied by itself (PEFT trains such copies) has values.
            memo[id(self)] = ordinary = _ordinary(self, requires_grad=True)
            return ordinary
        origin = replace(self._origin, owner=weakref.ref(memo[id(owner)]))
        memo[id(self)] = twin = _wrap(type(self), self, origin)
        return twin

    def __copy__(self) -> RemoteTensor:
        copied: RemoteTensor = _wrap(type(self), self, self._origin)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _ordinary(self, requires_grad=False).__reduce_ex__(protocol)


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
            return _plainly(func, None, args, kwargs)
        _refuse_write(func, args[0] if args else next(iter(kwargs.values()), None), kwargs)
        return _read(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = copied = copy.deepcopy(_real(self), memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _real(self).__reduce_ex__(protocol)


def remote_buffer(tensor: torch.Tensor, origin: Origin) -> RemoteTensor:
    """A tensor of the shape, dtype and device of another one, with its values at an origin."""
    made: RemoteTensor = _wrap(RemoteTensor, tensor, origin)
    return made


def make_real(parameter: RemoteParameter, values: torch.Tensor) -> None:
    """Turn it into an ordinary parameter, in place: whoever holds it has the values then."""
    _become(parameter, nn.Parameter(values, requires_grad=False))


def make_remote(parameter: nn.Parameter, origin: Origin) -> None:
    """Turn an ordinary parameter into one without values, in place."""
    _become(parameter, _wrap(RemoteParameter, parameter, origin))


def _become(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Turn a parameter into another one.

    As `torch.utils.swap_tensors`, which wants that no graph of autograd holds it: a graph may, and
    goes on with what it has.
    """
    torch._C._swap_tensor_impl(parameter, other)
    parameter.__class__, parameter.__dict__ = other.__class__, other.__dict__


def _wrap(
    kind: type, like: torch.Tensor, origin: Origin, before: torch.Tensor | None = None
) -> Any:
    """One of the dtype and device of a tensor; what was converted to it gives shape and dtypes."""
    before = like if before is None else before
    # Meta, for torch then knows no memory of it, whichever device it says that it is on.
    none = torch.empty(before.shape, dtype=like.dtype, device="meta")
    made: Any = torch.Tensor._make_subclass(kind, none, False, dispatch_device=True)
    torch._C._set_throw_on_mutable_data_ptr(made)
    made._origin, made._device = origin, like.device
    dtypes = getattr(before, "_dtypes", ())
    made._dtypes = dtypes if dtypes[-1:] == (like.dtype,) else (*dtypes, like.dtype)
    made._memory = torch.empty((), dtype=like.dtype, device=like.device)
    return made


# How what needs no values is answered: a function, its first argument, and all of them.


def _plainly(func: Any, _first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _made_like(func: Any, _first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*tree_map(_stand_in, args), **tree_map(_stand_in, kwargs))


def _stand_in(value: Any) -> Any:
    """An ordinary tensor of its shape, dtype and device, and of no size."""
    return value._memory.expand(value.shape) if isinstance(value, RemoteTensor) else value


def _converted(
    func: Any, first: RemoteTensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        result = func(first._memory, *args[1:], **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        of_parameter = func in _DETACHING and isinstance(first, RemoteParameter)
        kind = Detached if of_parameter else RemoteTensor
        return _wrap(kind, result, first._origin, first)


def _switched(func: Any, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args[1] if len(args) > 1 else kwargs.get("requires_grad", True):
        _refuse(first, "requires_grad")
    if isinstance(first, Detached):
        first.__class__ = RemoteParameter  # type: ignore[assignment]
    return _plainly(func, first, args, kwargs)


def _set_data(func: Any, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    other = args[1]
    if not isinstance(other, RemoteTensor) or not _same(first, other):
        _refuse(first, "__set__")
    _plainly(func, first, args, kwargs)
    first._device, first._dtypes, first._memory = other._device, other._dtypes, other._memory


class _NoStorage(torch.UntypedStorage):
    """Tells weights from each other, and how little they take; there are no bytes to read."""

    _origin: Origin

    def __getitem__(self, *_: Any) -> NoReturn:
        _refuse_memory(_TENSOR.untyped_storage, self)

    __iter__ = __setitem__ = clone = copy_ = cpu = tolist = __getitem__  # type: ignore[assignment]


def _storage(_func: Any, first: Any, *_: Any) -> Any:
    storage = first._memory.untyped_storage()
    storage.__class__, storage._origin = _NoStorage, first._origin
    return storage


def _refuse_memory(func: Any, first: Any, *_: Any) -> NoReturn:
    origin = first._origin
    raise Unsupported(
        f"{func.__name__}: {origin.name} of block {origin.block} has no memory here; its values "
        f"are read by clone(), or bring the block home: swarm.own({origin.block})"
    )


def _refuse_write(func: Any, first: Any, kwargs: dict[str, Any]) -> None:
    written = kwargs.get("out", first if _writes(func) else None)
    _refuse_writes_to(written, getattr(func, "__name__", "a write"))


def _refuse_writes_to(written: Any, what: str) -> None:
    for target in written if isinstance(written, (list, tuple)) else (written,):
        if isinstance(target, (RemoteTensor, ReadView)):
            _refuse(target, what)


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function makes of the real values."""
    origins: dict[int, Origin] = {}

    def real(value: Any) -> Any:
        found = _real(value)
        if found is not value and not _transformed(found):
            origins[found.untyped_storage().data_ptr()] = value._origin
        return found

    def guarded(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return value
        if _transformed(value):
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


def _transformed(value: torch.Tensor) -> bool:
    """Whether it is inside of a function that `torch.func` transforms, and has no memory itself."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def _real(value: Any) -> Any:
    if isinstance(value, ReadView):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)
    if not isinstance(value, RemoteTensor):
        return value
    origin = value._origin
    found = origin.read(origin.block, origin.name)
    with torch._C.DisableTorchFunctionSubclass():
        for dtype in value._dtypes:
            found = found.to(dtype)
        return found.to(value._device)


def _ordinary(tensor: RemoteTensor, *, requires_grad: bool) -> torch.Tensor:
    """An ordinary tensor of its values, or parameter as it is one."""
    values = _real(tensor).detach().clone()
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(values, requires_grad=requires_grad) if is_parameter else values


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
        "trained from here; train a PEFT adapter around it, average only parameters with "
        "requires_grad, change a clone() for yourself, or bring the block home: "
        f"swarm.own({origin.block})"
    )


_TENSOR: Any = torch.Tensor
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
    "__hash__ __len__ _is_view backward dim element_size get_device is_complex is_floating_point "
    "is_contiguous is_inference is_signed ndimension nelement numel register_hook retain_grad size "
    "storage_offset register_post_accumulate_grad_hook stride"
)
_FUNCTIONS = "_has_compatible_shallow_copy_type is_complex is_floating_point numel"
# Asked for shape, dtype and device alone.
_MAKING_METHODS = "is_pinned is_same_size is_shared new_empty new_full new_ones new_zeros"
_MAKING_FUNCTIONS = (
    "empty_like full_like is_same_size ones_like rand_like randint_like randn_like result_type "
    "zeros_like"
)
_OF_MEMORY = (_TENSOR.data_ptr, _TENSOR.storage, _TENSOR._typed_storage)
_COSTLESS = frozenset(
    [
        *(
            getattr(torch.Tensor, name).__get__
            for name in _PROPERTIES.split()
            if hasattr(torch.Tensor, name)
        ),
        _TENSOR.grad.__set__,
        *(getattr(torch.Tensor, name) for name in _METHODS.split() if hasattr(torch.Tensor, name)),
        *(getattr(torch, name) for name in _FUNCTIONS.split()),
    ]
)
_MAKERS = [
    *(getattr(torch.Tensor, name) for name in _MAKING_METHODS.split()),
    *(getattr(torch, name) for name in _MAKING_FUNCTIONS.split()),
]
_ANSWERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_COSTLESS, _plainly),
    **dict.fromkeys(_MAKERS, _made_like),
    **dict.fromkeys(_CONVERSIONS, _converted),
    **dict.fromkeys(_SWITCHES, _switched),
    **dict.fromkeys(_OF_MEMORY, _refuse_memory),
    _TENSOR.data.__set__: _set_data,
    _TENSOR.untyped_storage: _storage,
}


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are elsewhere."""
    return isinstance(tensor, RemoteTensor)
