"""Two checkpoints of one folder name in one swarm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.hosting import HostedServer, HostedSwarm
from support.scene import TOLERANCE
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

import swarm_notebook as sn
from swarm_notebook.checkpoint.files.digest import digest
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.errors import OtherCheckpoint
from swarm_notebook.server.options import ServeOptions


@torch.no_grad()
def test_servers_of_another_checkpoint_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tiny_model("llama", tmp_path / "mine")
    theirs = tiny_model("llama", tmp_path / "theirs", seed=1)
    ids = torch.arange(3, 12)[None]
    expected = AutoModelForCausalLM.from_pretrained(mine, dtype=torch.float32)(ids).logits
    with HostedSwarm(mine, [(0, 3)]) as hosted:
        peers = hosted.initial_peers
        with HostedServer(ServeOptions(theirs, (2, 5), peers, name="other")):
            assert "serves another checkpoint" in caplog.text
            with pytest.raises(OtherCheckpoint) as error:
                sn.connect(peers, model=mine)
            for one in (mine, theirs):
                assert digest(resolve(one)) in str(error.value)
            # In lower precision it is the same checkpoint.
            with (
                HostedServer(ServeOptions(mine, (3, 5), peers, dtype="bfloat16")) as half,
                sn.connect(peers, model=mine) as swarm,
            ):
                row = next(row for row in swarm.status().servers if row.name == "other")
                assert (row.state, "another checkpoint" in row.note) == ("other checkpoint", True)
                chain = [hop.peer_id for hop in swarm.route().hops]
                assert chain == [hosted.servers[0].peer_id, half.peer_id]
            with (
                HostedServer(ServeOptions(mine, (3, 5), peers)),
                sn.connect(peers, model=mine) as swarm,
            ):
                ours = swarm.model(ids).logits
                torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
