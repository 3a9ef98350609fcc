"""Local swarms: real server processes that come up, die and come back as asked."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.forkserver import WARM
from support.patience import PATIENCE, wait_until
from support.processes import marked_processes

from swarm_notebook import LocalSwarm
from swarm_notebook.errors import ServerStartError


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, here and in processes that are started."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up again
    return place


def test_servers_come_up_are_killed_and_come_back(tiny_swarm: Callable[..., LocalSwarm]) -> None:
    local = tiny_swarm([(0, 3), (3, 5)])
    first, second = local.servers
    assert [server.blocks for server in local.servers] == [(0, 3), (3, 5)]
    assert len(local.initial_peers) == 2
    assert first.peer_id is not None
    assert first.peer_id in local.initial_peers[0]
    assert "ready" in repr(first)

    assert LocalSwarm.model_at(first.addresses) == local.model
    assert LocalSwarm.model_at(["/ip4/127.0.0.1/tcp/1/p2p/Qm"]) is None
    address = first.addresses
    daemons = psutil.Process(first.pid).children()
    first.kill()
    assert not first.running
    assert not any(daemon.pid in marked_processes() for daemon in daemons)
    assert local.initial_peers == second.addresses

    first.restart()
    assert first.running
    assert first.addresses == address  # the peer id and the port are kept

    second.terminate()
    assert "left the swarm" in second.log_path.read_text()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(
    tiny_llama: Path, folders: Path
) -> None:
    with pytest.raises(ServerStartError, match=r"(?s)local-0 .*exit code 2.*no-such-type") as error:
        LocalSwarm(tiny_llama, 1, dtype="no-such-type")
    # The log is kept where the error says, and nothing else.
    (left,) = folders.iterdir()
    assert [file.name for file in left.iterdir()] == ["local-0.log"]
    assert f"{left / 'local-0.log'}:" in str(error.value)
    assert "no-such-type" in (left / "local-0.log").read_text()


def test_nothing_is_left_after_a_with_block_or_an_exception(
    tiny_llama: Path, folders: Path
) -> None:
    def named(ending: str) -> list[Path]:
        return list(folders.rglob(f"*.{ending}"))

    local = LocalSwarm(tiny_llama, 1, threads=1)
    (server,) = local.servers
    assert named("log") == [server.log_path]
    assert not named("key")  # it is held in memory as soon as the network daemon has read it
    before = server.addresses
    server.restart()
    assert server.addresses == before
    assert not named("key")
    with pytest.raises(RuntimeError, match="inside"), local:
        raise RuntimeError("inside")
    assert not list(folders.iterdir())
    # Restarted after that, it is the same peer, and cleans up as well.
    server.launch()
    server.join([])
    server.wait_ready(90)
    assert server.addresses == before
    local.close()
    assert not list(folders.iterdir())


def test_the_log_of_a_server_that_broke_is_kept(
    tiny_llama: Path, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with LocalSwarm(tiny_llama, 1, threads=1) as local:
        (server,) = local.servers
        (daemon,) = psutil.Process(server.pid).children()
        daemon.kill()
        wait_until(lambda: not server.running)
    assert str(server.log_path) in caplog.text
    assert "p2pd" in server.log_path.read_text()
    assert [file.name for file in server.log_path.parent.iterdir()] == ["local-0.log"]


def test_nothing_is_left_when_the_interpreter_ends(tiny_llama: Path, folders: Path) -> None:
    script = textwrap.dedent(f"""
        import swarm_notebook as sn
        model = {str(tiny_llama)!r}
        local = sn.LocalSwarm(model, 1, threads=1)
        lending = sn.Lending(model, (0, 2), threads=1, initial_peers=local.initial_peers)
        lending.start()
        """)
    subprocess.run([*WARM, script], check=True, timeout=180)
    assert not list(folders.iterdir())


def test_servers_die_with_their_notebook_even_if_it_is_killed(
    tiny_llama: Path, folders: Path
) -> None:
    script = textwrap.dedent(f"""
        import swarm_notebook as sn
        local = sn.LocalSwarm({str(tiny_llama)!r}, 1, threads=1)
        print(local.servers[0].pid, flush=True)
        input()
    """)
    parent = subprocess.Popen(
        [*WARM, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    with parent.stdout, parent.stdin:
        server = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        # Its network daemon goes, too: the watch over every test sees to that.
        server.wait(PATIENCE)
    wait_until(lambda: not list(folders.iterdir()))
