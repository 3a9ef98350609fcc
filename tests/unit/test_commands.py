"""Every command, target and call that the papers and notebooks print is one that there is."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from IPython.core.error import UsageError

from swarm_notebook import cli
from swarm_notebook.notebook.arguments import CommandLine, HelpShown

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAPERS = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"^\s*(swarm-notebook|%%?swarm|make) (\S.*)$", re.MULTILINE)
COMMENT = re.compile(r"(?<!\\)\s+#.*$|; .*$|\s+&& .*$|: .*$|\s+\.\.\.$", re.MULTILINE)
CALL = re.compile(r"\b(sn|swarm|local|probing|tuning)\.(?!py\b)([a-zA-Z]\w*)(?=[(,)`]|$)")
# Said of a command that is only named.
ONLY_NAMED = re.compile("are required|expected (one|at least one) argument")
# Where the public names of each stand.
HOMES = {
    "sn": ["__init__.py"],
    "swarm": ["swarm.py"],
    "local": ["local/swarm.py"],
    "probing": ["probing/__init__.py"],
    "tuning": ["tuning/__init__.py"],
}
# What stands for a value of the reader's.
STANDS_FOR = {"SECONDS": "5", "SIZE": "2GB", "B": "4.5", "N": "3", "A:B": "0:15"}


def snippets(path: Path) -> Iterator[str]:
    """The code of a paper or notebook, in blocks or within a sentence."""
    if path.suffix == ".ipynb":
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                yield text
            else:
                yield from code(text)
    else:
        yield from code(path.read_text())


def code(text: str) -> Iterator[str]:
    yield from FENCED.findall(text)
    for quoted in QUOTED.findall(FENCED.sub("", text)):
        yield re.sub(r"\s+", " ", quoted)


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """Programs and what they are given."""
    for snippet in snippets(path):
        for program, words in COMMAND.findall(snippet.replace("\\\n", " ")):
            yield program, COMMENT.sub("", words).strip()


def refused(program: str, words: str) -> str:
    """Why a command cannot be given; empty if it can, or if it is only named."""
    why = parsed(program, words)
    return "" if ONLY_NAMED.search(why) else why


def parsed(program: str, words: str) -> str:
    """What is said of a command; empty if nothing is."""
    words = " ".join(STANDS_FOR.get(word, word) for word in words.split(" "))
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words.split() if "=" not in word]
        return next((f"no {one}" for one in targets if f"\n{one}:" not in makefile), "")
    try:
        if program == "swarm-notebook":
            with redirect_stderr(io.StringIO()) as said:
                cli.parser().parse_args(shlex.split(words))
        else:
            CommandLine(program).parse(words)
    except UsageError as error:
        return str(error)
    except HelpShown:
        return ""
    except SystemExit as end:
        return said.getvalue() if end.code else ""
    return ""


@pytest.mark.parametrize("path", [*PAPERS, *NOTEBOOKS], ids=lambda path: path.name)
def test_commands_that_are_printed_can_be_given(path: Path) -> None:
    wrong = [(*one, why) for one in sorted({*commands(path)}) if (why := refused(*one))]
    assert wrong == []


@pytest.mark.parametrize("path", [*PAPERS, *NOTEBOOKS], ids=lambda path: path.name)
def test_calls_that_are_printed_can_be_made(path: Path) -> None:
    wrong = []
    for home, name in sorted({found for one in snippets(path) for found in CALL.findall(one)}):
        sources = [(ROOT / "swarm_notebook" / file).read_text() for file in HOMES[home]]
        if not any(re.search(rf"\b{name}\b", source) for source in sources):
            wrong.append(f"{home}.{name}")
    assert wrong == []


def test_what_is_not_there_is_refused() -> None:
    assert refused("swarm-notebook", "serve org/name --blocks 0:15") == ""
    assert refused("swarm-notebook", "serve org/name --block-range 0:15")
    assert refused("%swarm", "generate Why is the sky blue?") == ""
    assert "not a command" in refused("%swarm", "conect")
    assert refused("make", "demo") == ""
    assert refused("make", "coffee") == "no coffee"


@pytest.mark.parametrize("command", ["serve", "status", "plan", "measure", "invite", "check"])
def test_a_help_names_magics_as_they_are_typed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a description ``%%`` stays as it is; argparse halves it only in the help of an option."""
    with pytest.raises(SystemExit):
        cli.parser().parse_args([command, "--help"])
    assert "%%" not in capsys.readouterr().out
