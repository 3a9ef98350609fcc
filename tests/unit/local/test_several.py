"""How the servers of several GPUs are started."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from swarm_notebook import cli
from swarm_notebook.local.several import command, environment
from swarm_notebook.parsing import gpus


def test_numbers_of_gpus() -> None:
    assert gpus("all") is None
    assert list(gpus("2") or ()) == [0, 1]
    assert list(gpus("3,0") or ()) == [3, 0]
    for wrong in ("0", "none", "1,1", "0,", "-1", "2.0", "", "1 2"):
        with pytest.raises(argparse.ArgumentTypeError, match="neither all"):
            gpus(wrong)


def test_each_has_a_name_an_identity_and_a_port_of_its_own() -> None:
    options = {
        "model": "org/name",
        "name": "box",
        "identity": Path("/keys/box"),
        "host_maddrs": ["/ip4/0.0.0.0/tcp/31330", "/ip4/0.0.0.0/udp/0/quic"],
        "initial_peers": ["/ip4/1.2.3.4/tcp/1"],
        "memory": 1 << 30,
        "bits": None,
        "lan": True,
        "dummy_weights": False,
    }
    first, second = (command(f"cuda:{index}", index, options) for index in range(2))
    assert first[:5] == [sys.executable, "-m", "swarm_notebook.cli", "serve", "org/name"]
    parsed = [cli.parser().parse_args(words[3:]) for words in (first, second)]
    assert [one.name for one in parsed] == ["box", "box-1"]
    assert [str(one.identity) for one in parsed] == ["/keys/box", "/keys/box-1"]
    assert parsed[1].host_maddrs == ["/ip4/0.0.0.0/tcp/31331", "/ip4/0.0.0.0/udp/0/quic"]
    for one in parsed:
        # Whom to join is told later; its GPU is the only one that the process sees.
        assert (one.initial_peers, one.device, one.chosen) == (["-"], "cuda", True)
        assert (one.memory, one.bits, one.lan, one.dummy_weights) == (1 << 30, None, True, False)
        assert one.exit_with_stdin
        assert one.gpus is False


def test_a_process_sees_no_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    assert environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "GPU-bb"
    assert environment("cpu")["CUDA_VISIBLE_DEVICES"] == "GPU-aa,GPU-bb"


@pytest.mark.parametrize("more", [["--blocks", "0:2"], ["--device", "cuda:1"]])
def test_what_each_chooses_itself_is_not_given(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "x", "--gpus", "all", *more]) == 1
    assert f"leave {more[0]} out" in capsys.readouterr().err


def test_a_machine_without_gpus_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["serve", "x", "--gpus", "0,2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("swarm-notebook: error: --gpus: this machine does not have them")
    assert line.endswith("[SN-device-missing]")
