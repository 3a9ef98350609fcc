"""A private swarm of processes, and the command line that keeps its book."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import swarm_notebook as sn
from swarm_notebook import cli
from swarm_notebook.errors import InvitationError, NotAMember
from swarm_notebook.net.membership.invitation import Invitation


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def test_a_private_swarm_of_this_machine(
    tiny_swarm: Callable[..., sn.LocalSwarm],
    capsys: pytest.CaptureFixture[str],
    shell: InteractiveShell,
) -> None:
    magic = functools.partial(shell.run_line_magic, "swarm")
    with pytest.raises(UsageError, match="no private swarm"):
        magic("members")
    local = tiny_swarm(2, private=True)
    with pytest.raises(NotAMember):
        sn.connect(local.initial_peers, timeout=5)
    magic("members")
    assert capsys.readouterr().out == "nobody has joined yet\n"
    magic("invite --expires 2h -o invitation")
    with sn.connect(shell.user_ns["invitation"], model=local.model) as swarm:
        swarm.model(torch.arange(3, 9)[None])
        assert len(swarm.status().servers) == 2
    (member,) = local.members()
    with provisionalcompleter():
        offered = [one.text for one in shell.Completer.completions("%swarm revoke ", 14)]
    assert member.name in offered
    shell.user_ns["mine"] = local
    magic("members --swarm mine -o known")
    assert shell.user_ns["known"] == [member]
    swarm_folder = str(local._swarm)
    assert cli.main(["members", "--swarm", swarm_folder]) == 0
    assert capsys.readouterr().out.startswith(f"{member.name}  notebook")
    magic(f"revoke {member.name}")
    assert "revoked" in capsys.readouterr().out
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
    assert "incomplete" in capsys.readouterr().err
    with pytest.raises(InvitationError, match="incomplete"):
        sn.connect("swarm1AAAA")
