"""The table in docs/compatibility.md, made from the marks of the tests.

    python tests/support/compatibility.py > docs/compatibility.md

A test that holds something to the local model carries ``@pytest.mark.works("Kind: what")``; one
that holds a refusal to its words carries ``@pytest.mark.refused("Kind: what", "what instead")``.
The marks are read from the sources: nothing is imported.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

HEAD = """# What works, and what is refused

<!-- Made by tests/support/compatibility.py from the marks of the tests; do not edit. -->

Whatever is done to a remote model takes effect as on the local one, or is refused at once by one
sentence that names the way out (contract C10). Each line is held by the test behind it: *yes* means
that the result equals the local model's. `swarm.own(3)` brings block 3 home; see
[architecture](architecture.md).
"""


@dataclass(frozen=True, order=True)
class Line:
    """One thing that works, or is refused.

    Attributes:
        instead: what to use instead; None if it works.
        test: the file, from the root of the project, and the name of the test.
    """

    kind: str
    what: str
    instead: str | None
    test: tuple[str, str]


def marked() -> Iterator[Line]:
    """All lines of the table, in the order of the tests."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                found = _read(decorator)
                if found:
                    kind, what = found[1][0].split(": ", 1)
                    instead = found[1][1] if found[0] == "refused" else None
                    name = path.relative_to(ROOT).as_posix()
                    yield Line(kind, what, instead, (name, node.name))


def _read(decorator: ast.expr) -> tuple[str, list[str]] | None:
    """The name of a mark and its words."""
    if not isinstance(decorator, ast.Call) or not isinstance(decorator.func, ast.Attribute):
        return None
    name = decorator.func.attr
    if name not in ("works", "refused"):
        return None
    return name, [ast.literal_eval(argument) for argument in decorator.args]


def table() -> str:
    """The whole page."""
    by_kind: dict[str, list[Line]] = defaultdict(list)
    for line in marked():
        by_kind[line.kind].append(line)
    parts = [HEAD]
    for kind in sorted(by_kind):
        rows = [
            f"| {line.what} | {'yes' if line.instead is None else 'no'} | {line.instead or ''} "
            f"| `{line.test[0]}::{line.test[1]}` |"
            for line in sorted(by_kind[kind], key=lambda line: (line.instead is not None, line))
        ]
        head = ["| what | works | instead | test |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {kind}", "", *head, *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(table(), end="")
