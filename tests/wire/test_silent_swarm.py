"""A swarm that is silent when it is asked who serves a model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.patience import within
from support.petals_peer import petals_swarm

from swarm_notebook.client.connection import Connection
from swarm_notebook.client.discovery import await_spans
from swarm_notebook.errors import ModelNotServed
from swarm_notebook.progress import Waiting


def test_it_is_waited_for_no_longer_than_was_said(tiny_llama: Path) -> None:
    """A reading of its records alone takes longer than that."""
    with petals_swarm(tiny_llama, [(0, 2), (2, 5)], daemons := []) as (peers, _):
        connection = Connection(peers, "another-model", 5, patience=1.0)
        for daemon in daemons:
            os.kill(daemon, signal.SIGSTOP)
        try:
            with (
                within(20.0),
                pytest.raises(ModelNotServed, match="what it did not say in time"),
            ):
                await_spans(connection, "another-model", peers, Waiting("Joining"))
        finally:
            for daemon in daemons:
                os.kill(daemon, signal.SIGCONT)
            connection.close()
