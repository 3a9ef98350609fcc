"""``swarm-notebook serve``: its options, and the server, or one per GPU, that it starts.

Heavy packages are imported when it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from swarm_notebook.errors import DeviceMissing, InvitationError
from swarm_notebook.parsing import add_served, count, gpus, size
from swarm_notebook.stdin import at_end_of_stdin

ANY_INTERFACE = "/ip4/0.0.0.0/tcp/0"


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve some blocks of a model to others",
        description="Serve some blocks of a model to others. Prints a JSON line "
        'with its addresses and {"ready": true} when it can be used; stop it with Ctrl-C.',
    )
    add_served(
        serve,
        model="the demo model",
        peers="start a new swarm); - reads them from one line of standard input",
    )
    serve.add_argument(
        "--swarm",
        metavar="NAME",
        help="start or resume the private swarm of this name (default: the model's name)",
    )
    serve.add_argument(
        "--join",
        metavar="INVITE",
        help="join a private swarm with an invitation, which also names the model",
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
        help="file of the private key, which keeps the peer id the same; created if missing",
    )
    serve.add_argument(
        "--gpus",
        type=gpus,
        default=False,
        metavar="WHICH",
        help="run a server on each GPU of this machine (all), on the first two (2), or on these "
        "(0,2); each chooses its own blocks, and all stop together",
    )
    serve.add_argument(
        "--dummy-weights",
        action="store_true",
        help="random weights of the model's shape, to measure and plan with; announced under "
        "another name",
    )
    serve.add_argument(
        "--cache-tokens",
        type=count,
        metavar="N",
        help="size of the KV cache for all sessions together, in tokens",
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
        help="memory for incoming requests and outgoing answers (default: 512MiB, or enough for "
        "the largest requests of two notebooks)",
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
        help="make the results of a session independent of other users, to the bit; slower",
    )
    serve.add_argument(
        "--exit-with-stdin",
        action="store_true",
        help="stop when standard input closes, as a notebook's own servers do",
    )
    # Of a notebook's own servers: a folder that they remove if the notebook is killed.
    serve.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    # Of several servers of a machine: choose blocks by memory, also in a swarm that is begun.
    serve.add_argument("--chosen", action="store_true", help=argparse.SUPPRESS)
    serve.set_defaults(run=_serve)


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
            # Whoever would remove it was killed.
            at_end_of_stdin(partial(shutil.rmtree, scratch, ignore_errors=True))
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
        at_end_of_stdin(servers.stop)
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
        raise InvitationError(
            "--private starts a swarm and --join joins one: give only one of them"
        )
    settings["initial_peers"] = [*settings["initial_peers"], text]
    if settings["model"] is None:
        if not invitation.model:
            raise InvitationError(
                "the swarm's model has no name that others know: give its folder or file, too, as "
                "`swarm-notebook serve MODEL --join …`"
            )
        settings["model"] = invitation.model
