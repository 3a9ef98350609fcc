"""The JavaScript and CSS of the widgets, each as the one self-contained text that anywidget wants.

The sources are plain ES modules in ``js/src`` of the repository, ``widgets/js`` of an installed
wheel. They share code by ``import { … } from "./dom.js"``, which tsc, vitest and a browser read as
it stands. A widget is saved in a notebook as one text, so here every such import is replaced by
the module that it names, once, without its ``export`` words: all top-level names then live in one
scope. For this to be as simple as it sounds, imports are of that one form, exports stand before
``function``, ``class`` or ``const``, and no top-level name occurs twice.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

MAX_BYTES = 50_000  # a widget's script is saved with every notebook that shows it
THEME = "theme.css"

_WIDGETS = Path(__file__).parents[1]
_IMPORT = re.compile(r'^import\s*\{[^}]*\}\s*from\s*"\./([\w-]+\.js)";\n', re.MULTILINE)
_ANY_IMPORT = re.compile(r"^(import\b.*|export\s*[*{].*)$", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const)\b)", re.MULTILINE)
_TOP_LEVEL = re.compile(r"^(?:async )?(?:function|class|const|let)\s+([\w$]+)", re.MULTILINE)


@cache
def folder() -> Path:
    """Where the sources are: packed into the wheel, or in the repository."""
    packed = _WIDGETS / "js"
    return packed if packed.is_dir() else _WIDGETS.parents[1] / "js" / "src"


@cache
def script(name: str) -> str:
    """The module ``name.js`` with all that it imports, as one text.

    Raises:
        ValueError: the modules break one of the rules above.
    """
    parts: dict[str, str] = {}
    _collect(f"{name}.js", parts)
    text = "\n".join(parts.values())
    names = _TOP_LEVEL.findall(text)
    if twice := sorted({found for found in names if names.count(found) > 1}):
        raise ValueError(f"{name}.js and what it imports define {', '.join(twice)} twice")
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"{name}.js has {len(text.encode())} bytes, the limit is {MAX_BYTES}")
    return text


@cache
def style(name: str) -> str:
    """The theme, and the ``.css`` of the same name beside ``name.js`` and all that it imports."""
    parts: dict[str, str] = {}
    _collect(f"{name}.js", parts)
    sheets = [folder() / THEME, *((folder() / part).with_suffix(".css") for part in parts)]
    return "".join(sheet.read_text("utf-8") for sheet in sheets if sheet.exists())


def _collect(name: str, parts: dict[str, str]) -> None:
    """Add a module to the parts, after those that it imports."""
    if name in parts:
        return
    text = (folder() / name).read_text("utf-8")
    for needed in _IMPORT.findall(text):
        _collect(needed, parts)
    text = _EXPORT.sub("", _IMPORT.sub("", text))
    if odd := _ANY_IMPORT.search(text):
        raise ValueError(f'{name}: {odd[0]!r} is not of the form import {{ … }} from "./…";')
    parts[name] = text
