"""Servers of this machine where nothing can be written any more."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import swarm_notebook as sn
from swarm_notebook.errors import ServerStartError


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 64 kB, where temporary files are made."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_named(small_disk: Path, tiny_llama: Path) -> None:
    with (small_disk / "rest").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with pytest.raises(ServerStartError, match=r"set TMPDIR|No space left") as error:
        sn.LocalSwarm(tiny_llama, 1, threads=1)
    assert "is full" in str(error.value) or "no temporary folder" in str(error.value)
