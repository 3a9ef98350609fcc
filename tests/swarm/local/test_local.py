"""Local swarms: real server processes that come up, die and come back as asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.patience import PATIENCE
from support.processes import marked_processes

from swarm_notebook import LocalSwarm
from swarm_notebook.errors import ServerStartError


def test_servers_come_up_are_killed_and_come_back(tiny_swarm: Callable[..., LocalSwarm]) -> None:
    local = tiny_swarm([(0, 3), (3, 5)])
    first, second = local.servers
    assert [server.blocks for server in local.servers] == [(0, 3), (3, 5)]
    assert len(local.initial_peers) == 2
    assert first.peer_id is not None
    assert first.peer_id in local.initial_peers[0]
    assert "ready" in repr(first)

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


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tiny_llama: Path) -> None:
    with pytest.raises(ServerStartError, match=r"(?s)local-0 .*exit code 2.*no-such-type"):
        LocalSwarm(tiny_llama, 1, dtype="no-such-type")


def test_servers_die_with_their_notebook_even_if_it_is_killed(tiny_llama: Path) -> None:
    script = textwrap.dedent(f"""
        import swarm_notebook as sn
        local = sn.LocalSwarm({str(tiny_llama)!r}, 1, threads=1)
        print(local.servers[0].pid, flush=True)
        input()
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    with parent.stdout, parent.stdin:
        server = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        # Its network daemon goes, too: the watch over every test sees to that.
        server.wait(PATIENCE)
