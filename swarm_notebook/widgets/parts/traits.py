"""Types of traits, for annotations: what is read, and what may be assigned.

A type checker that sees the package from outside does not look into what a trait is made with.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import traitlets

String: TypeAlias = "traitlets.Unicode[str, str | bytes]"
Whole: TypeAlias = "traitlets.Int[int, int]"
MaybeWhole: TypeAlias = "traitlets.Int[int | None, int | None]"
Real: TypeAlias = "traitlets.Float[float, int | float]"
MaybeReal: TypeAlias = "traitlets.Float[int | None, int | float | None]"
AnyReal: TypeAlias = "traitlets.CFloat[float, Any]"
Flag: TypeAlias = "traitlets.Bool[bool, bool | int]"
Blob: TypeAlias = "traitlets.Bytes"
