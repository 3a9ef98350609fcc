"""What ``swarm-notebook`` and ``%swarm`` read alike: types of arguments, and options of both."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from swarm_notebook.errors import PlanError

DTYPES = ("float32", "bfloat16", "float16")


def blocks(text: str) -> tuple[int, int]:
    """A range of blocks, ``A:B``."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B with A < B, like 0:15")
    return int(found[1]), int(found[2])


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def gpus(text: str) -> Sequence[int] | None:
    """Numbers of GPUs: ``2`` are the first two, ``0,2`` these; None, ``all``, is each there is."""
    if text == "all":
        return None
    if re.fullmatch(r"[1-9]\d?", text):
        return range(int(text))
    numbers = [int(part) for part in text.split(",")] if re.fullmatch(r"\d+(,\d+)+", text) else []
    if not numbers or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is neither all, nor a number, nor like 0,2")
    return numbers


def size(text: str) -> int:
    """A number of bytes, such as ``20GB`` or ``512MiB``."""
    from swarm_notebook.planning.machines import read_bytes

    try:
        return int(read_bytes(text))
    except PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def duration(text: str) -> int:
    """Seconds, such as ``30m``, ``12h`` or ``7d``."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, like 30m, 12h or 7d")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def add_private(
    invite: argparse.ArgumentParser,
    members: argparse.ArgumentParser,
    revoke: argparse.ArgumentParser,
    *,
    which: str,
) -> None:
    """Which private swarm, who may join it, and who is shut out (see `net.membership`).

    Args:
        which: swarm is meant, for the help.
    """
    invite.add_argument(
        "--role",
        choices=("notebook", "server"),
        default="notebook",
        help="what they may do; a server may also do what a notebook may (default: %(default)s)",
    )
    invite.add_argument(
        "--expires",
        type=duration,
        default="7d",
        metavar="TIME",
        help="how long it can be redeemed, such as 30m, 12h or 7d (default: %(default)s)",
    )
    invite.add_argument(
        "--uses",
        type=count,
        default=1,
        metavar="N",
        help="how many can use it (default: 1)",
    )
    revoke.add_argument(
        "member",
        metavar="MEMBER",
        help="as `members` shows it; or an invitation, or its name: everybody who used it",
    )
    for command in (invite, members, revoke):
        command.add_argument("--swarm", metavar="NAME", help=which)


def add_served(serve: argparse.ArgumentParser, *, model: str, peers: str) -> None:
    """What a server is to hold, for whom, and with what of its machine (see `ServeOptions`).

    Args:
        model, peers: which ones are taken if none are given, for the help.
    """
    serve.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a Hub id, a folder, or a GGUF file (default: {model})",
    )
    serve.add_argument(
        "--blocks",
        type=blocks,
        metavar="A:B",
        help="serve blocks A to B-1 (default: all in a new swarm, else those that it needs most, "
        "chosen again when that changes)",
    )
    serve.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="memory for weights, such as 20GiB. If not all blocks fit unquantised: as many as fit "
        "at --bits, or at the fewest bits measured to be good enough, and then at the most bits "
        "that fit; never more, also while the server moves to other blocks (default: to join a "
        "swarm, 70 %% of what is free, unquantised)",
    )
    serve.add_argument(
        "--initial-peers",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help=f"servers of the swarm to join, as /ip4/…/tcp/…/p2p/… (default: {peers}",
    )
    serve.add_argument(
        "--lan",
        action="store_true",
        help="let `%%swarm connect --lan` find this server on the local network, and join the "
        "swarm of this model that is found there",
    )
    serve.add_argument(
        "--private",
        action="store_true",
        help="serve only people who were invited (see `invite`); creates the swarm's key if there "
        "is none yet",
    )
    serve.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
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
        "--bits",
        type=float,
        metavar="B",
        help="bits per weight on average, scales included, from 2.5 to 16: each matrix gets as "
        "many as it needs; with --memory, the least (default: as stored; those of a GGUF file stay "
        "packed if memory is short)",
    )
    serve.add_argument("--threads", type=count, metavar="N", help="CPU threads for torch")
    serve.add_argument("--name", metavar="NAME", help="the name that others see")


def add_plan(plan: argparse.ArgumentParser) -> None:
    """Which model, which machines, and what is asked of them (see `planning.plan`)."""
    plan.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hub id, folder, config file or GGUF file (default: the demo model)",
    )
    plan.add_argument(
        "--machine",
        action="append",
        default=[],
        metavar="NAME[:MEMORY[:BANDWIDTH]]",
        help="a GPU or a Mac by its name, such as rtx3090 or m2-max:64GB, or any other machine "
        "with its figures, such as laptop:16GB:60GB/s; repeat for each (default: --this-machine)",
    )
    plan.add_argument(
        "--this-machine", action="store_true", help="measure this machine and put it first"
    )
    plan.add_argument("--context", type=count, default=4096, metavar="N", help="tokens of context")
    plan.add_argument("--sessions", type=count, default=1, metavar="N", help="concurrent sessions")
    plan.add_argument(
        "--bits", type=float, metavar="B", help="per weight, 2.5 to 16 (default: all that fit)"
    )
    plan.add_argument(
        "--link",
        default="1ms:1Gbit/s",
        metavar="ROUND_TRIP[:BANDWIDTH]",
        help="the network between the machines (default: %(default)s)",
    )
