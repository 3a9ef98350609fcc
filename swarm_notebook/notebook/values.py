"""What the arguments of ``%swarm`` may be: each a function that argparse calls with the text."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

SOME_BLOCKS = "numbers as 3 or -1, or ranges as 0:2"


def some_blocks(text: str) -> int | slice:
    """A block such as ``3`` or ``-1``, or a range such as ``2:5``."""
    try:
        bounds = [int(part) if part else None for part in text.split(":")]
        if len(bounds) == 1:
            return int(text)
        start, end = bounds
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a block; {SOME_BLOCKS}") from None
    return slice(start, end)


def name(text: str) -> str:
    """A variable of the notebook."""
    if not text.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not a variable's name")
    return text


def temperature(text: str) -> float:
    """0, which is greedy, or a positive number."""
    return _number(text, lambda value: 0 <= value < math.inf, "0 (greedy) or a positive number")


def number(text: str) -> float:
    """Any number but infinity."""
    return _number(text, math.isfinite, "a number")


def share(text: str) -> float:
    """Above 0 and at most 1."""
    return _number(text, lambda value: 0 < value <= 1, "above 0 and at most 1")


def verify(text: str) -> str | float:
    """How much is audited, as for `connect`."""
    if text in ("spot", "off"):
        return text
    return _number(text, lambda value: 0 <= value <= 1, "spot, off or a share from 0 to 1")


def seed(text: str) -> int:
    """0 or a whole number above it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 or a positive integer")
    return int(text)


def address(text: str) -> str:
    """An address; what looks like a model is refused with the option that takes it."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+|(~|\.\.?)?/?[^/].*\.gguf", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is a model, not an address; did you mean --model {text}?"
        )
    return text


def seconds(text: str) -> float:
    """A positive number of seconds."""
    return _number(text, lambda value: value > 0, "a positive number of seconds")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value
