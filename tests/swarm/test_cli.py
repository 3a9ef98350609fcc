"""The command line, as a user runs it: exit codes, one-line errors, help without heavy imports."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.hosting import HostedSwarm
from support.patience import PATIENCE, within

from swarm_notebook import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm_notebook.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_help_is_quick_and_names_everything() -> None:
    with within(3):
        top, serve = run("--help"), run("serve", "--help")
    assert top.returncode == serve.returncode == 0
    assert "serve" in top.stdout
    assert "status" in top.stdout
    for option in ("blocks", "initial-peers", "host-maddrs", "identity", "cache-tokens", "name"):
        assert f"--{option}" in serve.stdout


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "serve some blocks of a model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "x", "--blocks", "4:2"],
        ["serve", "x", "--blocks", "all"],
        ["serve", "x", "--cache-tokens", "0"],
        ["serve", "x", "--dtype", "int4"],
        ["status"],
        ["nothing"],
    ],
)
def test_wrong_arguments_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(r"swarm-notebook: error: [^\n]*config\.json[^\n]*", error)


@pytest.mark.parametrize(
    ("maddr", "words"),
    [
        ("/ip4/127.0.0.1/tcp/{port}", r"cannot listen on /ip4/127[^\n]*Choose another"),
        ("127.0.0.1:{port}", r"host_maddrs: '127[^\n]*expected the form /ip4/"),
    ],
    ids=["taken", "malformed"],
)
def test_an_address_that_cannot_be_had_is_one_line(
    maddr: str, words: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = maddr.format(port=taken.getsockname()[1])
        assert cli.main(["serve", str(tiny_llama), "--host-maddrs", address]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert re.search(words, error)


def test_serve_until_interrupted(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "swarm_notebook.cli", "serve", str(tiny_llama)]
    command += ["--blocks", "1:3", "--threads", "1", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout is not None
        lines = map(json.loads, server.stdout)
        ready = next(line for line in lines if line.get("ready"))
        assert ready["blocks"] == [1, 3]
        assert ready["peer_id"] in ready["maddrs"][0]
        server.send_signal(signal.SIGINT)
        assert server.wait(PATIENCE) == 0


def test_status_of_a_swarm(demo_swarm: HostedSwarm, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ([], ["--model", demo_swarm.model]):
        assert cli.main(["status", *demo_swarm.initial_peers, *model]) == 0
        shown = capsys.readouterr().out
        assert "all 30 blocks served" in shown
        assert "local-1" in shown


def test_memory_is_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parser().parse_args(["serve", "--memory", "20GB"]).memory == 20 * 10**9
    assert cli.parser().parse_args(["serve", "--memory", "2GiB"]).memory == 2 << 30
    with pytest.raises(SystemExit):
        cli.main(["serve", "model", "--memory", "much"])
    assert "'much' is not a size" in capsys.readouterr().err


def test_a_swarm_that_is_named_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swarm_notebook.server import process
    from swarm_notebook.server.options import ServeOptions

    seen: list[ServeOptions] = []
    monkeypatch.setattr(process, "main", seen.append)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # `serve` would set it for its process
    cli.main(["serve", "model", "--swarm", str(tmp_path / "mine")])
    cli.main(["serve", "model"])
    assert [options.swarm for options in seen] == [tmp_path / "mine", None]
