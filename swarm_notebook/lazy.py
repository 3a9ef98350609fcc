"""Public names of a package that are imported on first use, because what they need is heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import FrameType


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        homes: public name -> the module of the package that defines it, or that is meant itself.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if _only_listed():
            raise AttributeError(f"module {package!r} imports {name!r} when it is used")
        module = import_module(f"{package}.{homes[name]}")
        value = module if name == homes[name] else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        # Without what the package's file imports for itself, which Tab would offer, too.
        return sorted({*homes, *(name for name in vars(sys.modules[package]) if name[:2] == "__")})

    return get, names


def _only_listed() -> bool:
    """Whether Tab asks what kind of thing this is, beside a name that it offers in any case.

    IPython has jedi find that out for the names in turn, until 0.4 s are over. The first of them
    alone would import torch in the middle of somebody's typing, or wait for a thread that does so.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "type" and frame.f_globals["__name__"] == "jedi.api.classes":
            return True
        frame = frame.f_back
    return False
