"""A private swarm of processes, and the command line that keeps its book."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import swarm_notebook as sn
from swarm_notebook import cli
from swarm_notebook.errors import InvitationError, NotAMember
from swarm_notebook.net.membership.invitation import Invitation


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def test_a_private_swarm_of_this_machine(
    tiny_swarm: Callable[..., sn.LocalSwarm], capsys: pytest.CaptureFixture[str]
) -> None:
    local = tiny_swarm(2, private=True)
    with pytest.raises(NotAMember):
        sn.connect(local.initial_peers, timeout=5)
    with sn.connect(local) as swarm:
        swarm.model(torch.arange(3, 9)[None])
        assert len(swarm.status().servers) == 2
    (member,) = local.members()
    swarm_folder = str(local._swarm)
    assert cli.main(["members", "--swarm", swarm_folder]) == 0
    assert capsys.readouterr().out.startswith(f"{member.name}  notebook")
    assert cli.main(["revoke", member.name, "--swarm", swarm_folder]) == 0
    assert "revoked" in capsys.readouterr().out
    order = ["invite", "--role", "server", "--expires", "2h", "--uses", "3"]
    assert cli.main([*order, "--swarm", swarm_folder]) == 0
    invitation = Invitation.read(capsys.readouterr().out)
    assert (invitation.role.label, invitation.swarm) == ("server", local._authority().swarm)
    assert set(invitation.addresses) == set(local.initial_peers)


def test_what_is_not_private(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["invite"]) == 1
    assert "SN-invitation-error" in capsys.readouterr().err
    assert cli.main(["serve", "--join", "swarm1AAAA"]) == 1
    assert "cut" in capsys.readouterr().err
    with pytest.raises(InvitationError, match="cut"):
        sn.connect("swarm1AAAA")
