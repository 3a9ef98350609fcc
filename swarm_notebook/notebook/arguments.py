"""The command line of ``%swarm``: its subcommands, their options, and what Tab offers.

Pure parsing: nothing here talks to a swarm or to IPython's machinery. Wrong arguments raise
IPython's `UsageError`, which a notebook shows as one line; ``--help`` prints and raises `HelpShown`
where argparse would end the process.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError

from swarm_notebook.notebook import values
from swarm_notebook.notebook.typed import split
from swarm_notebook.parsing import DTYPES, add_plan, add_private, add_served, count

COMPRESSIONS = ("float16", "int8")


EXAMPLES = """\
examples:
  %swarm connect                                   two server processes on this machine
  %swarm connect /ip4/…/tcp/…/p2p/… --model NAME   an existing swarm
  %swarm connect swarm1…                           a private swarm, with an invitation
  %swarm connect --lan                             a swarm on the local network
  %swarm generate "Why is the sky blue?" -o answer
"""


class HelpShown(Exception):
    """The user asked for help and has got it."""


class Arguments(argparse.ArgumentParser):
    """A parser for a notebook, which must survive wrong arguments."""

    def __init__(self, **options: Any) -> None:
        self.values_by_option: dict[str, list[str] | None] = {}  # None: it takes no value
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's; remembers the options for Tab."""
        action = super().add_argument(*names, **options)
        for option in action.option_strings:
            values = None if action.nargs == 0 else list(action.choices or ())
            self.values_by_option[option] = values
        return action

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise HelpShown


class CommandLine:
    """All of ``%swarm`` (or ``%%swarm``, which takes the cell's text as the prompt)."""

    top: Arguments

    def __init__(self, magic: str) -> None:
        self.top = Arguments(
            prog=magic,
            description="Attach this notebook to a swarm and generate with its model.",
            epilog=EXAMPLES,
        )
        self._table = self.top.add_subparsers(title="commands", dest="command", metavar="COMMAND")
        self.commands: dict[str, Arguments] = {}
        if magic == "%swarm":
            self._connect()
            self._view(
                "status", "show which servers hold which blocks, and what is missing", "SwarmStatus"
            )
            self._view("route", "show the servers that a token passes", "RouteTable")
            self._home()
            self._view("map", "watch the swarm live", "SwarmMap")
            self._lens()
            self._privacy()
            self._monitor()
            self._serve()
            self._private()
            self._plan()
            self._chat()
        self._generate(with_prompt=magic == "%swarm")
        if magic == "%swarm":
            self._add("disconnect", "end the connection; an embedded swarm ends with it")
        self._help()

    def parse(self, line: str) -> argparse.Namespace:
        """The command in `line`; ``command`` is ``help`` when there is none.

        Raises:
            UsageError: the arguments are wrong; one line says how.
            HelpShown: help was asked for and printed.
        """
        if asked := re.fullmatch(r"\s*(\w*)\s*\?+\s*", line):
            self.show_help(asked[1] if asked[1] in self.commands else None)
            raise HelpShown
        words: Sequence[str] = split(line) or ["help"]
        if words[0] not in self.commands and not words[0].startswith("-"):
            meant = _did_you_mean(words[0], self.commands)
            self.top.error(f"{words[0]!r} is not a command{meant}")
        arguments, unknown = self.top.parse_known_args(words)
        if unknown:
            parser = self.commands[arguments.command]
            meant = _did_you_mean(unknown[0].replace("_", "-"), parser.values_by_option)
            parser.error(f"unrecognized argument {unknown[0]}{meant}")
        return arguments

    def show_help(self, command: str | None = None) -> None:
        """Print the help of one command, or of all."""
        (self.commands[command] if command else self.top).print_help()

    def complete(self, line: str) -> list[str]:
        """The words that may stand at the end of `line` (magic included, up to the cursor)."""
        words = line.split()
        if not line[-1:].isspace():
            words = words[:-1]  # without the one that is being typed
        if len(words) <= 1:
            return list(self.commands)
        if words[1] == "help":
            return [command for command in self.commands if command != "help"]
        parser = self.commands.get(words[1])
        if parser is None:
            return []
        values = parser.values_by_option.get(words[-1])
        return list(parser.values_by_option) if values is None else values

    def _add(self, name: str, summary: str) -> Arguments:
        parser: Arguments = self._table.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        self.commands[name] = parser
        return parser

    def _view(self, name: str, summary: str, shown: str) -> None:
        _add_output(self._add(name, summary), f"the {shown}")

    def _connect(self) -> None:
        connect = self._add(
            "connect", "connect, and define model, tokenizer and swarm in the notebook"
        )
        connect.add_argument(
            "peers",
            nargs="*",
            type=values.address,
            metavar="ADDRESS",
            help="servers of the swarm, as /ip4/…/tcp/…/p2p/…, or an invitation to a private one "
            "(default: start a swarm of two server processes on this machine)",
        )
        connect.add_argument(
            "--lan",
            action="store_true",
            help="find servers on the local network that were started with --lan",
        )
        connect.add_argument(
            "--model",
            metavar="MODEL",
            help="Hub id, folder or GGUF file (default: the one that the swarm serves)",
        )
        connect.add_argument(
            "--dtype",
            choices=DTYPES,
            help="dtype of what runs here (default: that of the servers)",
        )
        connect.add_argument(
            "--device",
            metavar="DEVICE",
            help="device of what runs here, such as cuda:1 (default: a GPU if there is one)",
        )
        connect.add_argument(
            "--compression",
            choices=COMPRESSIONS,
            help="compress hidden states in transit; shifts the results a little (default: none)",
        )
        connect.add_argument(
            "--own",
            nargs="+",
            type=values.some_blocks,
            metavar="BLOCK",
            help=f"bring these blocks home: {values.SOME_BLOCKS}",
        )
        connect.add_argument(
            "--timeout",
            type=values.seconds,
            metavar="S",
            help="give up after S seconds (default: 30)",
        )
        connect.add_argument(
            "--verify",
            type=values.verify,
            metavar="RATE",
            help="share of the work to repeat on other servers as a check: spot (2 %%), off, or "
            "0.1 (default: spot for public addresses)",
        )
        _add_output(connect, "the Swarm object", "")

    def _home(self) -> None:
        own = self._add("own", "bring blocks home: load their weights and run them here")
        own.add_argument(
            "blocks", nargs="+", type=values.some_blocks, metavar="BLOCK", help=values.SOME_BLOCKS
        )
        release = self._add("release", "let blocks that are at home run on the servers again")
        release.add_argument(
            "blocks",
            nargs="*",
            type=values.some_blocks,
            metavar="BLOCK",
            help=f"{values.SOME_BLOCKS} (default: all that are at home)",
        )

    def _lens(self) -> None:
        lens = self._add(
            "lens", "show the next-token prediction of each block, at each token of a text"
        )
        lens.add_argument("text", nargs="+", metavar="TEXT", help="the text")
        lens.add_argument("--token", metavar="WORD", help="colour by the rank of this token")
        _add_output(lens, "the LensWidget")

    def _privacy(self) -> None:
        privacy = self._add("privacy", "see what servers can read of a text")
        privacy.add_argument("text", nargs="+", metavar="TEXT", help="what to attack")
        privacy.add_argument(
            "--tokens",
            type=count,
            default=32,
            metavar="N",
            help="attack its first N tokens (default: %(default)s)",
        )
        _add_output(privacy, "the Privacy report")

    def _monitor(self) -> None:
        monitor = self._add("monitor", "follow a training run; defines monitor in the notebook")
        monitor.add_argument("--total", type=count, metavar="N", help="steps of the run")
        _add_output(monitor, "the TrainingMonitor")

    def _serve(self) -> None:
        serve = self._add(
            "serve",
            "lend this machine: serve blocks of a model to a swarm; starts at once with --blocks "
            "or --memory",
        )
        add_served(
            serve,
            model="the model of the swarm that is attached",
            peers="the attached swarm, else a new one)",
        )
        serve.add_argument(
            "--listen",
            metavar="ADDRESS",
            help="where to listen, such as /ip4/0.0.0.0/tcp/0, which others can reach (default: "
            "only this machine if all known servers are on it, else all interfaces)",
        )
        _add_output(serve, "the ServePanel")

    def _private(self) -> None:
        invite = self._add("invite", "invite somebody to a private swarm that was started here")
        members = self._add("members", "show who has joined a private swarm that was started here")
        revoke = self._add("revoke", "shut a member out of a private swarm that was started here")
        add_private(
            invite,
            members,
            revoke,
            which="which one: a variable, or its name on this machine (default: the only one of "
            "this notebook, else of this machine)",
        )
        _add_output(invite, "the invitation")
        _add_output(members, "the list of them")

    def _plan(self) -> None:
        plan = self._add("plan", "say whether a model runs on some machines, and how fast")
        add_plan(plan)
        _add_output(plan, "the Plan")

    def _chat(self) -> None:
        chat = self._add("chat", "talk with the model; defines chat in the notebook")
        chat.add_argument("--system", metavar="TEXT", help="instructions to begin with")
        chat.add_argument(
            "--steer",
            metavar="VECTOR",
            help="a SteeringVector to add while it answers: a variable, or the file of a saved one",
        )
        chat.add_argument(
            "--strength",
            type=values.number,
            default=1.0,
            metavar="X",
            help="scale (default: 1)",
        )
        _add_sampling(chat)
        _add_output(chat, "the ChatWidget")

    def _generate(self, *, with_prompt: bool) -> None:
        generate = self._add("generate", "answer a prompt; the text streams into the cell")
        if with_prompt:
            generate.add_argument("prompt", nargs="*", metavar="TEXT", help="what to answer")
        generate.add_argument(
            "--widget",
            action="store_true",
            help="generate in the background, in a view that colours each token by its probability",
        )
        generate.add_argument(
            "--raw", action="store_true", help="continue the text itself: no chat template"
        )
        _add_sampling(generate)
        _add_output(generate, "the text (or the GenerateWidget)", "")

    def _help(self) -> None:
        shown = list(self.commands)
        self._add("help", "show this, or the help of one command").add_argument(
            "about", nargs="?", choices=shown, metavar="COMMAND"
        )


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _add_sampling(parser: Arguments) -> None:
    parser.add_argument(
        "-n",
        "--max-new-tokens",
        type=count,
        default=256,
        metavar="N",
        help="generate at most N tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--sample", action="store_true", help="sample tokens (default: greedy, the most probable)"
    )
    parser.add_argument(
        "--temperature",
        type=values.temperature,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: the model's own, else 1)",
    )
    parser.add_argument(
        "--top-p",
        type=values.share,
        metavar="P",
        help="sample from the most probable tokens with this total probability "
        "(default: the model's own, else 1)",
    )
    parser.add_argument(
        "--seed", type=values.seed, metavar="N", help="random seed (default: different each time)"
    )


def _add_output(parser: Arguments, what: str, instead: str = " instead of showing it") -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=values.name,
        metavar="NAME",
        help=f"store {what} in this variable{instead}",
    )
