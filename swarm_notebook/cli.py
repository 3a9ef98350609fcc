"""``swarm-notebook``: what there is to do with a swarm outside a notebook.

Exit codes: 0 done, 1 an error (one line on standard error), 2 wrong arguments, 3 some blocks have
no server, 130 interrupted. Heavy packages are imported by the command that needs them,
so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from swarm_notebook import __version__
from swarm_notebook.errors import MissingBlocks, SwarmError
from swarm_notebook.parsing import DTYPES, add_plan, add_private
from swarm_notebook.serving import add_serve
from swarm_notebook.texts import clean

PROGRAM = "swarm-notebook"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130
    except (SwarmError, OSError) as error:
        where = f" [{error.reference}]" if isinstance(error, SwarmError) else ""
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}{where}", file=sys.stderr)
        return 3 if isinstance(error, MissingBlocks) else 1


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog=PROGRAM, description="Serve and inspect a swarm.")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    def show_help(_options: argparse.Namespace) -> int:
        top.print_help()
        return 2

    top.set_defaults(run=show_help)
    add_serve(commands)
    _add_status(commands)
    _add_plan(commands)
    _add_measure(commands)
    _add_members(commands)
    _add_check(commands)
    return top


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser(
        "status",
        help="show which servers hold which blocks of a model",
        description="Show which servers hold which blocks of a model. "
        "The exit code is 3 if some blocks have no server.",
    )
    status.add_argument("peers", nargs="+", metavar="ADDRESS", help="servers of the swarm")
    status.add_argument("--model", metavar="MODEL", help="default: the one it serves")
    status.set_defaults(run=_status)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="replay a record of wrong answers with the model's weights",
        description="Replay a record written by swarm.audit().export(FILE), block by block, with "
        "the weights of the checkpoint. The exit code is 1 unless all of it is confirmed.",
    )
    check.add_argument("file", metavar="FILE", type=Path)
    check.add_argument(
        "--model", metavar="MODEL", help="where the checkpoint is (default: as the record says)"
    )
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from swarm_notebook.check import CONFIRMED, check

    findings = check(options.file, options.model)
    for finding in findings:
        print(clean(str(finding)))
    return 0 if all(finding.outcome == CONFIRMED for finding in findings) else 1


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="say whether a model runs on some machines, and how fast, before it is downloaded",
        description="Say whether a model runs on some machines, with which blocks where, and how "
        "fast. Reads only its config and the headers of its files, and assumes that the notebook "
        "runs on the first machine. The exit code is 1 if the model does not fit.",
    )
    add_plan(plan)
    plan.set_defaults(run=_plan)


def _add_measure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    measure = commands.add_parser(
        "measure",
        help="say what a model loses with fewer bits per weight",
        description="Say what a model loses with fewer bits per weight, on a small text of this "
        "package: the perplexity with and without quantisation, and how far the distributions of "
        "the next token are apart. The original weights are read block by block.",
    )
    measure.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a Hub id, a folder, or a GGUF file (default: the demo model)",
    )
    measure.add_argument(
        "--bits",
        type=float,
        default=4.5,
        metavar="B",
        help="per weight, 2.5 to 16 (default: %(default)s)",
    )
    measure.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="what to compute in (default: %(default)s)",
    )
    measure.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    measure.set_defaults(run=_measure)


def _measure(options: argparse.Namespace) -> int:
    import torch

    from swarm_notebook.checkpoint.files.source import resolve
    from swarm_notebook.server.engine.quantising.loss import measure_loss

    source = resolve(options.model)
    dtype = getattr(torch, options.dtype)
    print(measure_loss(source, bits=options.bits, dtype=dtype, device=options.device))
    return 0


def _add_members(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    invite = commands.add_parser(
        "invite",
        help="invite somebody to a private swarm started on this machine",
        description="Print an invitation, for `%swarm connect INVITE`, `sn.connect(INVITE)` or "
        "`swarm-notebook serve --join INVITE`. A server of the swarm must run on this machine.",
    )
    invite.set_defaults(
        run=_private,
        told=lambda swarm, given: [
            swarm.invite(given.role, expires=given.expires, uses=given.uses)
        ],
    )
    members = commands.add_parser(
        "members",
        help="show who has joined a private swarm started on this machine",
        description="Show who has joined a private swarm started on this machine.",
    )
    members.set_defaults(run=_private, told=lambda swarm, _: swarm.members())
    revoke = commands.add_parser(
        "revoke",
        help="shut a member out of a private swarm started on this machine",
        description="Shut out a member, or everybody who used an invitation, within ten seconds.",
    )
    revoke.set_defaults(run=_private, told=lambda swarm, given: swarm.revoke(given.member))
    add_private(
        invite, members, revoke, which="which swarm (default: the only one on this machine)"
    )


def _private(options: argparse.Namespace) -> int:
    """Ask a private swarm of this machine; what it tells, line by line."""
    from swarm_notebook.net.membership.authority import begun_here

    for line in options.told(begun_here(options.swarm), options):
        print(line)
    return 0


def _status(options: argparse.Namespace) -> int:
    from swarm_notebook.connecting import look

    status = look(options.peers, model=options.model)
    print(status)
    return 3 if status.missing else 0


def _plan(options: argparse.Namespace) -> int:
    from swarm_notebook.planning.plan import machines_of, plan

    found = plan(
        options.model,
        machines_of(options.machine, measured=options.this_machine),
        context=options.context,
        sessions=options.sessions,
        bits=options.bits,
        link=options.link,
    )
    print(found)
    for line in found.commands(options.model or ""):
        print(f"  $ {line}")
    return 0 if found.fits else 1


if __name__ == "__main__":
    sys.exit(main())
