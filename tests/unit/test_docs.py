"""The papers name only what is there: files, folders, tests, constants, contracts, links."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import compatibility

import swarm_notebook
from swarm_notebook import errors

PACKAGE = Path(swarm_notebook.__file__).parent
ROOT = PACKAGE.parent
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAPERS = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").rglob("*.md"))

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*\.(py|md|js|css|ipynb|toml|txt|cfg|cff)")
FOLDER = re.compile(r"\.?[\w-]+(/[\w-]+)*/")
MODULE = re.compile(r"swarm_notebook(\.[a-z_]\w*)+")
# In drawings paths stand without quotes.
DRAWN = re.compile(r"\b[a-z_]+(?:/[a-z_]+)+\.py\b")
TEST = re.compile(r"test_[a-z]\w+")
CONSTANT = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
CITED = re.compile(r"\bC(\d{1,2})\b")
WRITTEN = re.compile(r"^\*\*C(\d+) ", re.MULTILINE)


def source(*folders: Path) -> str:
    texts = [path.read_text() for folder in folders for path in sorted(folder.rglob("*.py"))]
    return "\n".join(texts)


def exists(name: str) -> bool:
    """Whether a path is there, as seen from the repository or from the package."""
    # What is made when it is needed: the environment is in no checkout.
    return name == ".venv/" or any((base / name).exists() for base in (ROOT, PACKAGE))


def module_exists(name: str) -> bool:
    """Whether a dotted name is a module, or leads to one by leaving out its last part."""
    path = ROOT.joinpath(*name.split("."))
    return any(one.with_suffix(".py").exists() or one.is_dir() for one in (path, path.parent))


def wrong(text: str) -> Iterator[str]:
    """The names in a paper of files, folders, modules, tests and constants that are not there."""
    code, tests = source(PACKAGE), source(ROOT / "tests")
    others = "\n".join((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    for name in sorted({*QUOTED.findall(FENCED.sub("", text)), *DRAWN.findall(text)}):
        if FILE.fullmatch(name) or FOLDER.fullmatch(name):
            if not exists(name):
                yield f"path {name}"
        elif MODULE.fullmatch(name):
            if not module_exists(name):
                yield f"module {name}"
        elif TEST.fullmatch(name):
            if f"def {name}(" not in tests:
                yield f"test {name}"
        elif CONSTANT.fullmatch(name) and not re.search(rf"\b{name}\b", code + others):
            yield f"constant {name}"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_what_a_paper_names_is_there(paper: Path) -> None:
    assert not list(wrong(paper.read_text()))


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_links_lead_somewhere(paper: Path) -> None:
    links = [link for link in LINK.findall(paper.read_text()) if "://" not in link]
    assert not [link for link in links if not (paper.parent / link).exists()]


def test_what_is_not_there_is_found() -> None:
    text = "`client/nowhere.py`, `swarm_notebook.swarm.Swarm`, `gone/`, `swarm_notebook.gone.too`,"
    text += " `test_of_nothing`, `PROTOCOL_VERSION`, `NO_SUCH_LIMIT`, server/engine/gone.py"
    found = [
        "path client/nowhere.py",
        "path gone/",
        "constant NO_SUCH_LIMIT",
        "path server/engine/gone.py",
        "module swarm_notebook.gone.too",
        "test test_of_nothing",
    ]
    assert sorted(wrong(text)) == sorted(found)


def test_every_line_of_the_threat_model_names_its_test_or_says_that_there_is_no_defence() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    lines = [line for line in text.splitlines() if re.fullmatch(r"\|.*\|.*\|.*\|", line)]
    attacks = [line for line in lines if not re.fullmatch(r"\|( .* \| what .*|[-|]+)\|", line)]
    assert len(attacks) > 50
    assert not [
        line
        for line in attacks
        if not TEST.search(line.split("|")[-2]) and "not defended" not in line.split("|")[-2]
    ]


def test_contracts_that_code_cites_can_be_read() -> None:
    cited = set(CITED.findall(source(PACKAGE)))
    written = set(WRITTEN.findall((ROOT / "docs" / "architecture.md").read_text()))
    assert cited
    assert cited <= written


def kinds_of_error() -> set[str]:
    """Names of all classes under `SwarmError`, wherever they are."""
    classes = [
        (node.name, {base.id for base in node.bases if isinstance(base, ast.Name)})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    found = {"SwarmError"}
    while more := {name for name, bases in classes if bases & found} - found:
        found |= more
    return found - {"SwarmError"}


def test_every_error_has_its_place_in_troubleshooting() -> None:
    kinds = [type(name, (errors.SwarmError,), {}) for name in kinds_of_error()]
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^### (SN-\S+)", text, re.MULTILINE)
    assert sorted(headings) == sorted(errors.reference(kind) for kind in kinds)


def texts() -> list[str]:
    """All texts in the package, with … where a value stands."""

    def text(node: ast.AST) -> str:
        match node:
            case ast.JoinedStr():
                return "".join(map(text, node.values))
            case ast.Constant(value=str(value)):
                return value
        return "…"

    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]


def test_troubleshooting_quotes_what_errors_say() -> None:
    said = "\n".join(texts())
    parts = re.split(
        r"^### ", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE
    )
    for part in parts[1:]:
        code, lines, _ = part.split("\n\n", 2)
        quotes = re.findall(r"\*([^*]+)\*(?: · |$)", lines.replace("\n", " "))
        assert quotes or code == "SN-remote-error", code
        assert not [quote for quote in quotes if quote.strip("… ") not in said], code


def test_an_error_says_where_it_is_explained() -> None:
    error = errors.MissingBlocks("no server holds block 3")
    shown = "".join(traceback.format_exception(error))
    assert shown.endswith("no server holds block 3\n[SN-missing-blocks]\n")


def test_the_table_of_what_works_is_what_the_tests_say() -> None:
    assert (ROOT / "docs" / "compatibility.md").read_text() == compatibility.table(), (
        "make it again: python tests/support/compatibility.py > docs/compatibility.md"
    )


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda one: one.stem
)
def test_stored_outputs_name_no_folder_of_a_machine(notebook: Path) -> None:
    """Warnings of libraries do."""
    assert not re.search(r"site-packages|/home/\w|/root/", notebook.read_text())
