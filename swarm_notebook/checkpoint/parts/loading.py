"""Runs transformers' own `from_pretrained` on a part of a model.

Two things make the loading partial:

- While `from_pretrained` constructs the model (on meta: no memory), a subclass of the same name
  lets the caller edit it, before any weight is sought. Afterwards the object gets its class back.
- The state dict that is handed over holds `LazyTensor`s of the wanted part only (`files.weights`).

So renamed and fused weights, precision plans and tied embeddings are handled by the code that
knows them. Constructing a model sets process-wide defaults of torch for a moment, so one lock
serialises it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from swarm_notebook.checkpoint.files.quantised import (
    check_loads,
    explained,
    method_of,
    telling,
)
from swarm_notebook.checkpoint.files.weights import LazyTensor
from swarm_notebook.errors import ModelNotFound, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from swarm_notebook.checkpoint.files.source import ModelSource

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes to read), from whatever thread reads."""

_construction = threading.Lock()


def class_for(source: ModelSource, mapping: Any, kind: str) -> type[PreTrainedModel]:
    """The model class that a transformers auto `mapping`, for a `kind`, has for `source`."""
    config = source.config()
    if type(config) not in mapping:
        raise Unsupported(f"transformers has no {kind} for {config.model_type!r} models")
    return mapping[type(config)]


def load(
    source: ModelSource,
    model_class: type[PreTrainedModel],
    edit: Callable[[PreTrainedModel], None],
    tensors: dict[str, LazyTensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    progress: Progress | None,
    headers: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
    describe: Callable[[PreTrainedConfig], None] = lambda _: None,
) -> PreTrainedModel:
    """Load `tensors` into a `model_class` that `edit` has changed while it was empty.

    Args:
        describe: changes the config before.
        headers: what a quantizer is to find in the headers of the files.
        labels: names of the classes of a classifier. Weights of its head that the checkpoint does
            not have are new and trainable; all others are frozen.

    Raises:
        ModelNotFound: a tensor that the edited model needs is missing, or has another shape.
        Unsupported: the weights are quantised, and nothing here reads them.
    """
    partial_class: Any = _edited(model_class, edit)
    on_cpu = torch.device(device).type == "cpu"
    config = source.config()
    describe(config)
    method = method_of(config)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if method is not None:
        check_loads(source.name, method)
        tensors = {name: _finite(source, name, lazy) for name, lazy in tensors.items()}
    with _construction, _no_progress_bars(), explained(source.name, method), telling(headers or {}):
        model, report = partial_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors if progress is None else _reporting(tensors, progress),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **({} if on_cpu else {"device_map": {"": device}}),
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ModelNotFound(
            f"the weights of {source.name} do not fit its config: {name} has shape {tuple(found)}, "
            f"the config makes it {tuple(expected)} ({len(mismatched)} such tensors)"
        )
    base = f"{model.base_model_prefix}."
    new = {name for name in report["missing_keys"] if labels and not name.startswith(base)}
    if missing := sorted(report["missing_keys"] - new):
        raise ModelNotFound(
            f"the weights of {source.name} lack {len(missing)} tensors that "
            f"{model_class.__name__} needs ({', '.join(missing[:3])}…); download all of it"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)
    model.__class__ = model_class
    model.name_or_path = model.config.name_or_path = source.name
    return model


def _finite(source: ModelSource, name: str, lazy: LazyTensor) -> LazyTensor:
    """The same tensor; NaN in a scale of quantised weights would become many of them."""

    def read() -> torch.Tensor:
        tensor = lazy.read()
        floating = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
        if floating and not tensor.isfinite().all():
            raise ModelNotFound(
                f"{source.name}: tensor {name} has NaN or infinity in it; download it again"
            )
        return tensor

    return LazyTensor(read, lazy.nbytes, lazy.slice)


def _edited(
    model_class: type[PreTrainedModel], edit: Callable[[PreTrainedModel], None]
) -> type[PreTrainedModel]:
    def construct(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        edit(self)

    # The same name and module: transformers looks up conversions and recorders by them.
    names = {key: getattr(model_class, key) for key in ("__module__", "__qualname__")}
    return type(model_class.__name__, (model_class,), {"__init__": construct, **names})


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
    """Whoever passes `progress` shows it; transformers would draw a second bar."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
