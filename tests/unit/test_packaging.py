"""What other ways to install have in common with pyproject.toml."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import check
import pytest
import yaml

import swarm_notebook

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
CONDA = {"torch": "pytorch"}  # names that differ there


def wanted() -> set[str]:
    """What the package needs, as conda writes it."""
    found = {f"python {PROJECT['requires-python']}"}
    for line in PROJECT["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(.*)", line).groups()  # type: ignore[union-attr]
        found.add(f"{CONDA.get(name, name)} {version}")
    return found


def test_the_conda_recipe_needs_what_the_package_needs() -> None:
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert set(recipe["requirements"]["run"]) == wanted()
    assert recipe["context"]["version"] == swarm_notebook.__version__
    assert recipe["about"]["summary"] == PROJECT["description"]
    (entry,) = recipe["build"]["python"]["entry_points"]
    assert entry.split(" = ") == list(*PROJECT["scripts"].items())


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == swarm_notebook.__version__


def test_binder_asks_for_extras_that_there_are() -> None:
    asked = (ROOT / "binder" / "requirements.txt").read_text()
    (extras,) = re.findall(r"^\.\[(.*)\]$", asked, re.MULTILINE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_quick_start_says_what_extras_there_are() -> None:
    """But for those of who works on the project."""
    text = (ROOT / "docs" / "quickstart.md").read_text()
    told = re.findall(r"^\| `(\w+)` \|", text.partition("## Extras")[2], re.MULTILINE)
    assert set(told) == PROJECT["optional-dependencies"].keys() - {"dev", "docs", "release"}


def test_each_example_can_be_run_on_colab_and_binder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first cell installs what it needs there, and does nothing elsewhere."""
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/swarm")
    hook = runpy.run_path(str(ROOT / "docs" / "links.py"))["on_page_content"]
    examples = sorted((ROOT / "examples").glob("*.ipynb"))
    for path in examples:
        notebook = json.loads(path.read_text())
        first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        source = "".join(first["source"])
        (extras,) = re.findall(r'%pip install -q "swarm-notebook\[(\w+)\]"', source)
        assert extras in PROJECT["optional-dependencies"]
        assert re.search(r'^if "google.colab" in sys.modules:', source, re.MULTILINE)
        page = SimpleNamespace(file=SimpleNamespace(src_uri=f"notebooks/{path.name}"))
        shown = hook("<p>text</p>", page)
        assert f"github/someone/swarm/blob/main/examples/{path.name}" in shown
        assert f"gh/someone/swarm/main?labpath=examples%2F{path.name}" in shown
        monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
        assert hook("<p>text</p>", page) == "<p>text</p>"  # nobody knows where
        monkeypatch.setenv("GITHUB_REPOSITORY", "someone/swarm")
    assert len(examples) >= 12


def test_the_notes_of_a_release_are_its_part_of_the_changelog() -> None:
    changelog = (
        "# Changelog\n\n## Unreleased\n\n- c\n\n## [0.2.0] - 2026-12-01\n\n- b\n\n## 0.1.0\n\n- a\n"
    )
    assert check.notes(changelog, "0.2.0") == "- b\n"
    assert check.notes(changelog, "0.1.0") == "- a\n"
    assert check.notes(changelog, "0.3.0") == "- c\n"
    with pytest.raises(LookupError, match=r"0\.3\.0"):
        check.notes("# Changelog\n\n## 0.1.0\n\n- a\n", "0.3.0")
    assert check.version() == swarm_notebook.__version__


def test_the_index_shows_a_readme_whose_links_lead_to_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hatchling is there only while a package is built."""
    interface = SimpleNamespace(MetadataHookInterface=object)
    monkeypatch.setitem(sys.modules, "hatchling.metadata.plugin.interface", interface)
    hook = runpy.run_path(str(ROOT / "release" / "metadata.py"))["ReleaseMetadata"]
    hook.root = str(ROOT)

    def metadata() -> dict[str, Any]:
        found: dict[str, Any] = {}
        hook().update(found)
        return found

    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    here = metadata()
    assert here == {"readme": {"content-type": "text/markdown", "text": README}}
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/swarm")
    there = metadata()
    text = there["readme"]["text"]
    assert "](https://github.com/someone/swarm/blob/main/docs/protocol.md)" in text
    assert 'src="https://github.com/someone/swarm/raw/main/docs/session-light.webp"' in text
    assert not re.search(r'\]\((?!http|#)|(src|srcset)="(?!http)', text)
    assert "](https://github.com/learning-at-home/hivemind)" in text
    assert there["urls"]["Documentation"] == "https://someone.github.io/swarm/"


def test_a_wheel_with_too_much_or_too_little_is_no_release(tmp_path: Path) -> None:
    wheel = tmp_path / "swarm_notebook-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in check.WHEEL - {"swarm_notebook/py.typed"} | {"tests/test_one.py"}:
            archive.writestr(name, "")
    assert check.faults(wheel) == [
        "swarm_notebook/py.typed is missing",
        "tests/test_one.py would be installed beside the package",
    ]


def test_what_the_site_shows_by_a_link_is_in_the_sources_all_the_same() -> None:
    """Hatchling takes what it meets twice once, below the link."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    linked = {
        str(path.resolve().relative_to(ROOT))
        for path in ROOT.glob("docs/**/*")
        if path.is_symlink()
    }
    assert linked == build["targets"]["sdist"]["force-include"].keys()
