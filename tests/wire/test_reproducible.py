"""`serve --reproducible` on a CPU: what a session gets does not depend on who else is served."""

from __future__ import annotations

from pathlib import Path

import torch
from support.company import STEPS, outputs_of
from support.hosting import HostedSwarm

import swarm_notebook as sn

HIDDEN = 48


def test_bits_do_not_depend_on_company(tiny_llama: Path) -> None:
    with (
        HostedSwarm(tiny_llama, 1, reproducible=True) as servers,
        sn.connect(servers.initial_peers, model=tiny_llama) as swarm,
    ):
        alone = outputs_of(swarm.connection, HIDDEN, [], torch.float32)
        assert len(alone) == 1 + STEPS
        for others in ([7, 230, 90, 64], [150] * 6):
            among = outputs_of(swarm.connection, HIDDEN, others, torch.float32)
            assert all(map(torch.equal, alone, among))
        (row,) = swarm.status().servers
        assert (row.reproducible, row.engine_kind) == (True, "plain, reproducible")
        assert "plain, reproducible" in str(swarm.status())
        assert "plain, reproducible" in swarm.status().as_html()
