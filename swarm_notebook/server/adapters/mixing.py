"""Different adapters in one call of the blocks that they share.

The call runs the blocks as they are. Where an adapter has put a layer of its own around a module,
that layer is called for the tokens of its sessions, and what it asks of the module is there: its
part of what the module has just computed for the whole batch. So an adapter costs what it adds, the
weights of the blocks are read once for all, and how an adapter computes stays PEFT's own code. (A
layer that gives the module another input than it was given, as IA3 does in a feedforward, has it
computed for that input.)

Not every adapter can be mixed in: see `injection`, and `token_wise`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Blocks(Protocol):
    """The blocks ``[start, end)`` of a model."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    def layer(self, block: int) -> nn.Module: ...


# A module: its block, and its name in there.
Site = tuple[int, str]
# The layers of an adapter, by the modules around which they are.
Tuners = Mapping[Site, nn.Module]


class Unmixable(Exception):
    """A module is not called with every token of the call, one after the other."""


class Mixture:
    """The adapters of a call.

    Args:
        members: in the order of their tokens, each session's adapter and number of tokens.
    """

    def __init__(self, members: Sequence[tuple[Tuners, int]]):
        self._tokens = 0
        self._layers: dict[Site, list[tuple[int, int, Any]]] = defaultdict(list)
        # By identity: comparing two adapters would go through all their layers.
        for _, same in itertools.groupby(members, key=lambda member: id(member[0])):
            (tuners, tokens), *more = same
            tokens += sum(count for _, count in more)
            for site, layer in tuners.items():
                self._layers[site].append((self._tokens, tokens, layer))
            self._tokens += tokens

    def sites(self, start: int, end: int) -> set[Site]:
        """The modules in blocks ``[start, end)`` that are tuned."""
        return {site for site in self._layers if start <= site[0] < end}

    def apply(self, site: Site, x: torch.Tensor, output: torch.Tensor) -> None:
        """Apply the adapters to what a module gave for all tokens, in place."""
        for begin, tokens, layer in self._layers.get(site, ()):
            known = output.narrow(-2, begin, tokens)
            known.copy_(_beside(layer, x.narrow(-2, begin, tokens), known))

    @contextmanager
    def hooked(self, span: Blocks, start: int, end: int) -> Iterator[None]:
        """Apply whatever is tuned while the decoder of these blocks runs."""
        with ExitStack() as stack:
            for site in self.sites(start, end):
                hook = self._hook(site)
                stack.enter_context(module_at(span, site).register_forward_hook(hook))
            yield

    def _hook(self, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not fits(inputs, output, self._tokens):
                raise Unmixable(f"{site[1]} in block {site[0]} is not called token by token")
            self.apply(site, inputs[0], output)

        return hook


def module_at(span: Blocks, site: Site) -> nn.Module:
    """The module of a span that a site names."""
    return span.layer(site[0]).get_submodule(site[1])


def tunable(span: Blocks, start: int, end: int) -> list[Site]:
    """The modules in blocks ``[start, end)`` around which an adapter may have layers."""
    return [
        (index, name)
        for index in range(start, end)
        for name, module in span.layer(index).named_modules()
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and weight.ndim == 2
    ]


@contextmanager
def token_wise(span: Blocks, tokens: int) -> Iterator[set[Site]]:
    """Find the modules that a call of so many tokens gives all of them, one after the other.

    Experts, for example, are not among them: each is called with the tokens that are its own.
    """
    found: set[Site] = set()
    others: set[Site] = set()

    def watch(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            (found if fits(inputs, output, tokens) else others).add(site)

        return hook

    with ExitStack() as stack:
        for site in tunable(span, span.start, span.end):
            stack.enter_context(module_at(span, site).register_forward_hook(watch(site)))
        yield found
    found -= others


def fits(inputs: tuple[Any, ...], output: Any, tokens: int) -> bool:
    """Whether a module was given, and has given, one vector for each of so many tokens."""
    return all(
        isinstance(tensor, torch.Tensor)
        and tensor.ndim >= 2
        and tensor.shape[-2] == tokens
        and tensor.numel() == tokens * tensor.shape[-1]
        for tensor in (*inputs[:1], output)
    ) and bool(inputs)


def _beside(layer: Any, x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """What a layer of an adapter gives for ``x``, when its module gives ``known``."""
    module = layer.get_base_layer()
    original = module.forward

    def forward(asked: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return known if asked is x else original(asked, *rest, **named)

    # It may have a forward of its own already: see `products.kernels`.
    before = vars(module).get("forward")
    module.forward = forward
    try:
        return layer(x)
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
