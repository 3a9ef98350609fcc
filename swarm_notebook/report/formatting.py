"""Numbers, blocks and tables for people; no part of it knows what a swarm is.

Blocks are written as Python slices are: ``0:15`` is blocks 0 to 14. A value that is not known is a
dash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from swarm_notebook.texts import clean

if TYPE_CHECKING:
    import pandas as pd

Count = TypeVar("Count", bound=int | str | None)

UNKNOWN = "-"


def runs(counts: Sequence[Count]) -> list[tuple[int, int, Count]]:
    """Neighbours with the same count as ``(start, end, count)``."""
    found: list[tuple[int, int, Count]] = []
    for index, count in enumerate(counts):
        if found and found[-1][2] == count:
            found[-1] = (found[-1][0], index + 1, count)
        else:
            found.append((index, index + 1, count))
    return found


def number(value: float | None) -> str:
    """A measured number for people: three digits or so, thousands grouped."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def count(amount: int, unit: str) -> str:
    """A counted thing: ``1 text``, ``2 texts``."""
    return f"{amount:,} {unit}{'' if amount == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """A duration for people: ``1.2 ms``, ``0.5 s``, ``10 min``."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"


def size(count: int) -> str:
    """A number of bytes for people: three digits and a unit."""
    amount, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    if units[0] == "B":
        return f"{amount:.0f} B"
    return f"{amount:.{max(0, 3 - len(f'{amount:.0f}'))}f} {units[0]}"


def model_title(name: str) -> str:
    """A model's name for people: a folder's path is no part of it."""
    return clean(Path(name).name if Path(name).is_absolute() else name)


def text_table(head: Sequence[str], rows: Iterable[Sequence[str | None]]) -> list[str]:
    """Lines of a table with aligned columns."""
    cells = [
        list(head),
        *([UNKNOWN if cell is None else clean(cell) for cell in row] for row in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def data_frame(rows: Sequence[Any], columns: list[str]) -> pd.DataFrame:
    """Rows, by column or in the order of the columns, as a data frame; needs pandas."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_pandas() needs pandas: pip install 'swarm-notebook[pandas]'", name="pandas"
        ) from error
    return pd.DataFrame(rows, columns=columns)
