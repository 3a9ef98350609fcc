"""Adapters of notebooks, put around the real weights.

For each adapter the hosted blocks are cloned: modules of their own, which share every base
parameter and buffer with the originals. PEFT's layers are put into the clones as the notebook
describes them (`layers`), with the uploaded tensors in them. So those without an adapter run the
originals, as if there were none. Steps of sessions with different adapters can share a call of the
originals (`mixing`), if their layers allow it.

A new adapter runs two tokens before it is taken: one whose layers do not fit, or let tokens depend
on each other, is a bad request, and not a server that fails later on.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from swarm_notebook.errors import BadRequest
from swarm_notebook.server.adapters.layers import Builder
from swarm_notebook.server.adapters.low_rank import Additions
from swarm_notebook.server.adapters.mixing import Site, Tuners, fits
from swarm_notebook.server.engine.span import Span

if TYPE_CHECKING:
    from swarm_notebook.server.adapters.upload import Upload

# A prime above the number of blocks of any model: no two pairs of seed and block are the same.
_SEED_STEP = 1_000_003
# How far a token's result may be from what it is without its neighbour, relative to its size: some
# roundings of bfloat16.
_CLOSE = 5e-2
# PEFT draws its dropout from torch's generator, of which a process has one: servers that share the
# process take turns.
_GENERATOR = threading.Lock()


class AdaptedSpan(Span):
    """Blocks of a span with an adapter in them.

    Args:
        token_wise: the modules of ``base`` around which layers of adapters can be mixed in.

    Raises:
        BadRequest: the layers that are described are not accepted, or do not run in the blocks.
    """

    def __init__(self, base: Span, upload: Upload, token_wise: AbstractSet[Site] = frozenset()):
        start, end = upload.recipe.blocks
        layers = [_clone(base.layer(index)) for index in range(start, end)]
        super().__init__(base.decoder_around(start, layers), base.layers_name, start)
        self.recipe, self._base = upload.recipe, base
        self._own: list[nn.Module] = []
        self._places: dict[str, list[torch.Tensor]] = {name: [] for name in upload.tensors}
        self._parameters: dict[int, dict[str, nn.Parameter]] = {}
        tuners: dict[Site, Any] = {}
        trained = {
            described.tensors[name]
            for described in upload.layers.values()
            for name in described.trained
        }
        noise = torch.Generator().manual_seed(0)
        # For a start, values for the trial below: many adapters begin as doing nothing.
        tensors = {
            name: (torch.randn(one.shape, generator=noise).to(one) if name in trained else one).to(
                self.device
            )
            for name, one in upload.tensors.items()
        }
        if self.device.type != "cpu" and not all(map(torch.is_floating_point, tensors.values())):
            raise BadRequest(
                "adapter: whole numbers in its layers are indices, which only servers on a CPU can "
                "check; use another adapter type, or bring the blocks home: swarm.own(slice(None))"
            )
        for index, described in upload.layers.items():
            own = {name: tensors[source] for name, source in described.tensors.items()}
            builder = Builder(self.layer(index), f"block {index}", own, described.trained)
            builder.build(described.layers)
            self._own += builder.own
            for name, places in builder.places.items():
                self._places[described.tensors[name]] += places
            self._parameters[index] = {
                f"{index}.{name}": parameter for name, parameter in builder.parameters().items()
            }
            tuners |= {(index, path): layer for path, layer in builder.layers.items()}
        mixes = token_wise >= tuners.keys() and all(map(_is_beside, tuners.values()))
        self._all, self._mixed = tuners, tuners if mixes else None
        self._additions: Additions | None = None
        for layer in tuners.values():
            if not _is_beside(layer):
                # It may exchange the weight, which a forward of its own (`products`) does not see.
                for module in layer.get_base_layer().modules():
                    vars(module).pop("forward", None)
        self._try_out()

    def _try_out(self) -> None:
        """Run two tokens, and each layer of an unknown kind with the first of them alone.

        Only then what the layers say of themselves is looked at: PEFT has computed with it.
        """
        size = self.config.get_text_config().hidden_size
        noise = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 2, size, generator=noise)
        seen: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}
        layers = self._all

        def watch(site: Site) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if len(inputs) == 1 and fits(inputs, output, 2):
                    seen[site] = inputs[0], output

            return hook

        try:
            with ExitStack() as stack:
                for site, layer in layers.items():
                    stack.enter_context(layer.register_forward_hook(watch(site)))
                self.run(self.start, self.end, hidden)
            with torch.inference_mode():
                alone = {
                    site: layers[site](given.narrow(-2, 0, 1))
                    for site, (given, _) in seen.items()
                    if not _is_beside(layers[site])
                }
                self._additions = self._plain(seen)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever PEFT raises, the upload is what it does not like
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadRequest(
                f"the adapter does not run in these blocks: {reason}; use another adapter type, or "
                "bring the blocks home: swarm.own(slice(None))"
            ) from error
        for site, expected in alone.items():
            first = seen[site][1].narrow(-2, 0, 1).float()
            if (expected.float() - first).norm() > _CLOSE * first.norm():
                kind = type(layers[site]).__module__.split(".")[2]
                raise BadRequest(
                    f"adapter: PEFT's {kind} lets the tokens of a batch depend on each other, and "
                    "servers compute them in parts; use another adapter type, or bring the blocks "
                    "home: swarm.own(slice(None))"
                )

    def _plain(self, seen: Mapping[Site, tuple[torch.Tensor, torch.Tensor]]) -> Additions | None:
        """What the layers add, if that is all that they did to what they were given."""
        added = None if self._mixed is None else Additions.of(self._all, self.dtype)
        if added is None or seen.keys() != self._all.keys():
            return None
        agree = (added.agrees(site, self._all[site], *both) for site, both in seen.items())
        return added if all(agree) else None

    @property
    def host(self) -> Span:
        return self if self._mixed is None else self._base

    @property
    def tuners(self) -> Tuners:
        return self._mixed or {}

    @property
    def additions(self) -> Additions | None:
        return self._additions

    @property
    def storages(self) -> frozenset[int]:
        own = (
            tensor.untyped_storage().data_ptr()
            for places in self._places.values()
            for tensor in places[:1]
        )
        return self._base.storages.union(own)

    def load(self, upload: Upload) -> None:
        """Take over the values of an upload with the same recipe."""
        for name, tensor in upload.tensors.items():
            # Copied: the bytes of the upload go away.
            values = tensor.to(self.device, copy=True)
            for place in self._places[name]:
                place.data = values
        if self._additions is not None:
            self._additions.changed()

    def adapter_weights(self, start: int, end: int) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for index in range(start, end)
            for name, parameter in self._parameters.get(index, {}).items()
        }

    def compute(
        self,
        start: int,
        end: int,
        hidden: torch.Tensor,
        *,
        seed: int | None = None,
        by_row: Mapping[str, list[Any]] | None = None,
        **options: Any,
    ) -> list[torch.Tensor]:
        """`Span.compute`.

        Args:
            seed: of dropout in the adapter; None for none.
            by_row: what PEFT tells its layers for this call, one value for each row.
        """
        with ExitStack() as stack:
            if seed is not None:
                stack.enter_context(self._dropping(start, end, seed))
            if by_row:
                stack.enter_context(self._told(by_row))
            if self.device.type == "cpu":
                stack.enter_context(torch.sparse.check_sparse_tensor_invariants())
            return super().compute(start, end, hidden, **options)

    @contextmanager
    def _told(self, by_row: Mapping[str, list[Any]]) -> Iterator[None]:
        """Tell PEFT's layers something for one call, as PEFT itself does it."""

        def tell(
            _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**named, **by_row}

        with ExitStack() as hooks:
            for layer in self._all.values():
                hooks.enter_context(layer.register_forward_pre_hook(tell, with_kwargs=True))
            yield

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
                stack.enter_context(self.layer(index).register_forward_pre_hook(begin(index)))
            for module in self._own:
                module.training = True
                stack.callback(setattr, module, "training", False)
            yield


def _clone(layer: nn.Module) -> nn.Module:
    """New modules with the same parameters, buffers and config."""
    from transformers import PreTrainedConfig

    shared: list[Any] = [*layer.parameters(), *layer.buffers()]
    for module in layer.modules():
        shared += [value for value in vars(module).values() if isinstance(value, PreTrainedConfig)]
    return copy.deepcopy(layer, {id(value): value for value in shared})


def _is_beside(layer: nn.Module) -> bool:
    """Whether a layer adds to what its module gives, token by token (see `mixing`).

    Those around a bare parameter change the parameter instead.
    """
    from peft.tuners import ia3, loha, lokr, lora

    return isinstance(layer, (lora.Linear, ia3.Linear, loha.Linear, lokr.Linear))
