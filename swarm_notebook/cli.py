"""``swarm-notebook``: what there is to do with a swarm outside a notebook.

Exit codes: 0 done, 1 an error (one line on standard error), 2 wrong arguments, 3 some blocks have
no server, 130 interrupted. Heavy packages are imported by the command that needs them,
so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarm_notebook import __version__
from swarm_notebook.errors import DeviceMissing, InvitationError, MissingBlocks, SwarmError
from swarm_notebook.parsing import add_plan, add_private, blocks, count, gpus, size
from swarm_notebook.texts import clean

PROGRAM = "swarm-notebook"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ANY_INTERFACE = "/ip4/0.0.0.0/tcp/0"


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
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_status(commands)
    _add_plan(commands)
    _add_measure(commands)
    _add_members(commands)
    _add_check(commands)
    return top


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="hold some blocks of a model and compute them for others",
        description="Hold some blocks of a model and compute them for others. Prints a JSON line "
        'with its addresses and {"ready": true} when it can be used; stop it with Ctrl-C.',
    )
    serve.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a Hub id, a folder, or a GGUF file (default: the demo model)",
    )
    serve.add_argument(
        "--blocks",
        type=blocks,
        metavar="A:B",
        help="hold blocks A to B-1 only; only their tensors are read (default: all of a new swarm, "
        "else those that it needs most, and others when that changes)",
    )
    serve.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="for weights, such as 20GiB: as many blocks as it holds as they are; where that is "
        "not all, at --bits or what is measured to be good enough, and then at the most bits that "
        "hold them (default: 7 tenths of what is free, for who joins a swarm, and no fewer bits)",
    )
    serve.add_argument(
        "--initial-peers",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="servers of the swarm to join, as /ip4/…/tcp/…/p2p/… (default: begin a new swarm); "
        "- reads them from one line of standard input",
    )
    serve.add_argument(
        "--lan",
        action="store_true",
        help="be found on the local network by `%%swarm connect --lan`, and join the swarm of this "
        "model that is found there",
    )
    serve.add_argument(
        "--private",
        action="store_true",
        help="let in only those who are invited; makes the swarm's key if there is none yet, and "
        "prints an invitation",
    )
    serve.add_argument(
        "--swarm",
        metavar="NAME",
        help="begin the private swarm of this name, or go on with it (default: the model's name)",
    )
    serve.add_argument(
        "--join",
        metavar="INVITE",
        help="join a private swarm by an invitation, which names the model, too",
    )
    serve.add_argument(
        "--host-maddrs",
        nargs="+",
        default=[ANY_INTERFACE],
        metavar="ADDRESS",
        help=f"where to listen (default: {ANY_INTERFACE}, any free port)",
    )
    serve.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        help="private key that makes the peer id permanent; written if there is none",
    )
    serve.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what to compute in (default: %(default)s, the checkpoint's on a GPU, float32 on a "
        "CPU)",
    )
    serve.add_argument(
        "--device",
        default="auto",
        help="a torch device (default: %(default)s, a GPU where there is one)",
    )
    serve.add_argument(
        "--gpus",
        type=gpus,
        default=False,
        metavar="WHICH",
        help="a server on each GPU of this machine (all), on so many (2), or on some (0,2); each "
        "chooses its own blocks, and all leave together",
    )
    serve.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="bits per weight, scales included, from 2.5 to 16: each matrix gets as many as it "
        "needs within this mean; with --memory, at least so many (default: as they are; those of a "
        "GGUF file packed where memory is short)",
    )
    serve.add_argument(
        "--dummy-weights",
        action="store_true",
        help="random weights of the model's shape, to measure and plan; announced under another "
        "name",
    )
    serve.add_argument(
        "--cache-tokens",
        type=count,
        metavar="N",
        help="room for keys and values of all sessions together, in tokens",
    )
    serve.add_argument(
        "--activation-bytes",
        type=size,
        default="1GiB",
        metavar="SIZE",
        help="memory for activations that training notebooks ask to keep (default: %(default)s)",
    )
    serve.add_argument(
        "--traffic-bytes",
        type=size,
        metavar="SIZE",
        help="memory for requests that arrive and answers that leave (default: 512MiB, or what the "
        "largest requests of two notebooks take)",
    )
    serve.add_argument(
        "--adapter-bytes",
        type=size,
        default="256MiB",
        metavar="SIZE",
        help="memory for the adapters of one notebook (default: %(default)s)",
    )
    serve.add_argument(
        "--reproducible",
        action="store_true",
        help="what a session gets does not depend on who else is served, to the bit; slower",
    )
    serve.add_argument("--threads", type=count, metavar="N", help="CPU threads for torch")
    serve.add_argument("--name", metavar="NAME", help="what others see in their status")
    serve.add_argument(
        "--exit-with-stdin",
        action="store_true",
        help="leave when standard input closes, as a notebook's own servers do",
    )
    # Of a notebook's own servers: a folder that they remove if the notebook is killed.
    serve.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    # Of several servers of a machine: choose blocks by memory, also in a swarm that is begun.
    serve.add_argument("--chosen", action="store_true", help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser(
        "status",
        help="show which servers hold which blocks of a model",
        description="Show which servers hold which blocks of a model. "
        "The exit code is 3 if some blocks have no server.",
    )
    status.add_argument("peers", nargs="+", metavar="ADDRESS", help="servers of the swarm")
    status.add_argument("--model", metavar="MODEL", help="default: the one that is served")
    status.set_defaults(run=_status)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="replay a record of wrong answers with the model's weights",
        description="Replay a record that swarm.audit().export(FILE) has written, block by block, "
        "with the weights of the checkpoint. Exits with 1 unless all of it is confirmed.",
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
        help="say whether a model runs on some machines, and how fast, before it is fetched",
        description="Say whether a model runs on some machines, with which blocks where, and how "
        "fast. Only its config and the headers of its files are read. The notebook is taken to run "
        "on the first machine. The exit code is 1 if the model does not fit.",
    )
    add_plan(plan)
    plan.set_defaults(run=_plan)


def _add_measure(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    measure = commands.add_parser(
        "measure",
        help="say what a model loses with fewer bits per weight",
        description="Say what a model loses with fewer bits per weight, on a small text of this "
        "package: the perplexity beside that of the whole weights, and how far the distributions "
        "of the next token are apart. The whole weights are read block by block.",
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
        choices=DTYPES[1:],
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
        help="let somebody join a private swarm of this machine",
        description="Print an invitation, for `%%swarm connect INVITE`, `sn.connect(INVITE)` or "
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
        help="show who has joined a private swarm of this machine",
        description="Show who has joined a private swarm of this machine.",
    )
    members.set_defaults(run=_private, told=lambda swarm, _: swarm.members())
    revoke = commands.add_parser(
        "revoke",
        help="shut a member out of a private swarm of this machine",
        description="Shut a member out, or all who came by an invitation, within ten seconds.",
    )
    revoke.set_defaults(run=_private, told=lambda swarm, given: swarm.revoke(given.member))
    add_private(invite, members, revoke, which="which one (default: the only of this machine)")


def _private(options: argparse.Namespace) -> int:
    """Ask a private swarm of this machine; what it tells, line by line."""
    from swarm_notebook.net.membership.authority import begun_here

    for line in options.told(begun_here(options.swarm), options):
        print(line)
    return 0


def _serve(options: argparse.Namespace) -> int:
    # Read when torch is loaded. Threads that spin while they wait for each other take the cores
    # from other servers on the same machine: two that computed at once took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from swarm_notebook.checkpoint.files.source import resolve
    from swarm_notebook.server import process
    from swarm_notebook.server.options import ServeOptions

    settings = {key: value for key, value in vars(options).items() if key != "run"}
    scratch, joined = settings.pop("scratch"), settings.pop("join")
    several = settings.pop("gpus")
    private = settings.pop("private") or options.swarm is not None
    settings["swarm"] = _private_swarm(options) if private else None
    if joined is not None:
        _join(joined, settings)
    if several is not False:
        return _serve_on(several, options, settings)
    if options.initial_peers == ["-"]:
        # A local swarm starts all servers at once and says late whom to join. By then whatever
        # takes long is imported, and a server that others join answers them at once.
        resolve(options.model, dummy=options.dummy_weights).config()
        line = sys.stdin.readline()
        if not line:  # whoever started this server is gone
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            return 0
        if scratch is not None:
            threading.Thread(target=_remove_when_orphaned, args=(scratch,), daemon=True).start()
        settings["initial_peers"] = line.split()
    return process.main(ServeOptions(**settings))


def _serve_on(
    wanted: Sequence[int] | None, options: argparse.Namespace, settings: dict[str, Any]
) -> int:
    """A server on each of some GPUs."""
    from swarm_notebook.devices import AUTO, cards
    from swarm_notebook.local.several import Several

    if options.blocks is not None or options.device != AUTO:
        own = "--device" if options.blocks is None else "--blocks"
        raise DeviceMissing(f"--gpus: each server has its own GPU and blocks; leave {own} out")
    passed = {name: value for name, value in settings.items() if name != "blocks"}
    servers = Several(cards(wanted), passed)
    if options.exit_with_stdin:
        servers.stop_with_stdin()
    return servers.run()


def _private_swarm(options: argparse.Namespace) -> Path:
    """The folder of the swarm that is begun here."""
    from swarm_notebook.checkpoint.files.demo import DEMO_NAME
    from swarm_notebook.net.membership.authority import swarms_folder

    name = options.swarm or Path(options.model or DEMO_NAME).name
    return swarms_folder() / name


def _join(text: str, settings: dict[str, Any]) -> None:
    """Serve what an invitation names, where it leads."""
    from swarm_notebook.net.membership.invitation import Invitation

    invitation = Invitation.read(text)
    if settings["swarm"] is not None:
        raise InvitationError("--private begins a swarm, and --join joins one: give one of both")
    settings["initial_peers"] = [*settings["initial_peers"], text]
    if settings["model"] is None:
        if not invitation.model:
            raise InvitationError(
                "the swarm's model has no name that others know: give its folder or file, too, as "
                "`swarm-notebook serve MODEL --join …`"
            )
        settings["model"] = invitation.model


def _remove_when_orphaned(scratch: Path) -> None:
    """Remove a folder at the end of standard input: whoever would have done it was killed."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(scratch, ignore_errors=True)


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
