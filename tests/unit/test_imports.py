"""Imports go one way: no circles, and no arrow against the order of the rooms. Names stand once."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import swarm_notebook

ROOT = Path(swarm_notebook.__file__).parent
# Who may not import whom, at any depth of folders; first the importer.
FORBIDDEN = [
    ("net", "client model server report local planning notebook widgets"),
    ("client", "model server local planning notebook widgets"),
    ("model", "server local planning notebook widgets"),
    ("server", "client model report local planning notebook widgets swarm connecting"),
    ("server.engine", "net server.rpc"),
    ("server.adapters.file server.adapters.layers server.adapters.store", "net server.engine"),
    ("server.adapters.mixing server.adapters.upload", "net server.engine"),
    ("checkpoint", "net client model server report local planning notebook widgets"),
    ("report", "model server local planning notebook widgets"),
    ("planning", "net client model server local notebook widgets swarm connecting"),
]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, in functions and for type checkers as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, set[str]]:
    files = {
        ".".join((ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in ROOT.rglob("*.py")
    }
    named = {name.removesuffix(".__init__"): path for name, path in files.items()}
    return {name: imports(path) for name, path in named.items()}


def within(name: str, room: str) -> bool:
    room = f"{ROOT.name}.{room}"
    return name == room or name.startswith(f"{room}.")


def test_there_are_no_circles() -> None:
    found = modules()
    # A package's own file names its parts for those who import from it: no part needs it.
    graph = {
        name: {other for other in used if other in found and not name.startswith(f"{other}.")}
        - {name}
        for name, used in found.items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_no_arrow_goes_against_the_order_of_the_rooms() -> None:
    found = modules()
    wrong = [
        f"{name} imports {other}"
        for importers, rooms in FORBIDDEN
        for name, used in found.items()
        for other in used
        if any(within(name, room) for room in importers.split())
        and any(within(other, room) for room in rooms.split())
    ]
    wrong += [
        f"{name} imports {other}"
        for name, used in found.items()
        for other in used
        if within(name, "server.engine") and other.partition(".")[0] == "hivemind"
    ]
    assert not wrong


def test_one_thing_has_one_name() -> None:
    names = Counter(
        node.name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == []
