"""What `make release` looks at besides building: what is in the files, and what is new.

python release/check.py contents dist/*     a table of what they hold; fails on what is amiss
python release/check.py notes               this version's part of the changelog
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "swarm_notebook"
SCRIPTS = f"{PACKAGE}/widgets/js"  # where assets.py looks in an installed wheel
MOST_BYTES = 2_000_000  # of either file; the sources of 600 files are less than 1 MB packed
# Without these, an installed package is not whole, or nobody can test the sources.
WHEEL = {
    f"{PACKAGE}/__init__.py",
    f"{PACKAGE}/py.typed",
    f"{SCRIPTS}/dom.js",
    f"{SCRIPTS}/theme.css",
}
SOURCES = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "js/src/dom.js"}


def names(archive: Path) -> dict[str, int]:
    """The files of a wheel, or of an sdist below its folder, and their sizes."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {one.filename: one.file_size for one in wheel.infolist()}
    with tarfile.open(archive) as sdist:
        files = [one for one in sdist.getmembers() if one.isfile()]
        return {one.name.split("/", 1)[1]: one.size for one in files}


def faults(archive: Path) -> list[str]:
    """What is missing from a file, or should not be in it."""
    held = names(archive)
    wheel = archive.suffix == ".whl"
    found = [f"{name} is missing" for name in sorted((WHEEL if wheel else SOURCES) - held.keys())]
    for name in held:
        if wheel and not re.match(rf"{PACKAGE}(-[\d.]+\w*\.dist-info)?/", name):
            found.append(f"{name} would be installed beside the package")
        if re.search(r"__pycache__|node_modules|\.ipynb_checkpoints|\.pyc$", name):
            found.append(f"{name} is no source")
    if archive.stat().st_size > MOST_BYTES:
        found.append(f"{archive.stat().st_size} bytes, the limit is {MOST_BYTES}")
    return found


def table(archive: Path) -> str:
    """Files and bytes by folder."""
    count, size = Counter[str](), Counter[str]()
    for name, bytes_ in names(archive).items():
        folder = "/".join(name.split("/")[:-1][:2]) or "."
        count[folder] += 1
        size[folder] += bytes_
    lines = [f"{archive.name}, {archive.stat().st_size:,} bytes"]
    lines += [
        f"  {folder:40} {count[folder]:4} files {size[folder]:10,}" for folder in sorted(count)
    ]
    return "\n".join(lines)


def version() -> str:
    """The one place that says it."""
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return str(found)


def notes(changelog: str, version_: str) -> str:
    """The part of the changelog below a version's heading.

    Raises:
        LookupError: it has none, and nothing is "Unreleased" either.
    """
    parts = re.split(r"^## (.+)\n", changelog, flags=re.MULTILINE)
    found = {
        title.split(" - ")[0].strip("[] "): text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    for title in (version_, "Unreleased"):
        if title in found:
            return found[title].strip() + "\n"
    raise LookupError(f"CHANGELOG.md: no part on {version_}, and none that is unreleased")


def main(what: str, *archives: str) -> int:
    if what == "notes":
        print(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version()), end="")
        return 0
    bad = 0
    for archive in map(Path, archives):
        print(table(archive))
        for fault in faults(archive):
            print(f"  {fault}", file=sys.stderr)
            bad = 1
    return bad


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
