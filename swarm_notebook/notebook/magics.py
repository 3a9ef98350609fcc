"""``%swarm`` and ``%%swarm``: a thin shell over the public Python calls of `swarm_notebook.swarm`.

A command works on the variable ``swarm`` of the notebook, whoever put it there: ``%swarm connect``
or ``swarm = sn.connect(...)``. Importing this module is cheap; see `warmup` for what is not.
`unload` puts the shell back as `load` found it; a connection that was made stays until it is
disconnected.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.error import UsageError

from swarm_notebook.errors import SwarmError
from swarm_notebook.notebook.arguments import CommandLine, HelpShown
from swarm_notebook.notebook.typed import keep_lines, text_of
from swarm_notebook.notebook.warmup import Warmup

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from swarm_notebook.local.swarm import LocalSwarm
    from swarm_notebook.net.membership.authority import Authority
    from swarm_notebook.probing.steering import SteeringVector
    from swarm_notebook.swarm import Swarm

NAME = "swarm"

_loaded: dict[int, SwarmMagics] = {}


def load(shell: InteractiveShell) -> None:
    """Register the magics and their completion, and begin to warm up."""
    if id(shell) not in _loaded:
        _loaded[id(shell)] = SwarmMagics(shell)
        _loaded[id(shell)].register()


def unload(shell: InteractiveShell) -> None:
    """Undo what `load` did."""
    magics = _loaded.pop(id(shell), None)
    if magics is not None:
        magics.unregister()


class SwarmMagics:
    """The two magics of one shell."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self._line, self._cell = CommandLine("%swarm"), CommandLine("%%swarm")
        self._warmup = Warmup()
        self._before: dict[str, Callable[..., Any] | None] = {}
        self._matcher = self._make_matcher()

    def register(self) -> None:
        manager = self.shell.magics_manager
        for kind, function in (("line", self.line_magic), ("cell", self.cell_magic)):
            self._before[kind] = manager.magics[kind].get(NAME)
            manager.register_function(function, magic_kind=kind, magic_name=NAME)
        self.shell.Completer.custom_matchers.append(self._matcher)
        self.shell.input_transformers_cleanup.append(keep_lines)
        self._warmup.plan(self.shell)

    def unregister(self) -> None:
        self._warmup.cancel()
        self.shell.Completer.custom_matchers.remove(self._matcher)
        self.shell.input_transformers_cleanup.remove(keep_lines)
        for kind, before in self._before.items():
            table = self.shell.magics_manager.magics[kind]
            if before is None:
                table.pop(NAME, None)
            else:
                table[NAME] = before

    def line_magic(self, line: str) -> Any:
        """Attach this notebook to a swarm: %swarm COMMAND, see %swarm help."""
        return self._run(self._line, line, None)

    def cell_magic(self, line: str, cell: str) -> Any:
        """Let the swarm's model answer the cell's text: %%swarm generate."""
        return self._run(self._cell, line, cell)

    def _make_matcher(self) -> Callable[[Any], Any]:
        """What Tab offers in our lines, instead of the names of Python."""

        @context_matcher(identifier="swarm_notebook")  # type: ignore[untyped-decorator]
        def match(context: Any) -> dict[str, Any]:
            line = context.line_with_cursor[: context.cursor_position]
            found = re.match(r"\s*(?:[^\W\d][\w.]*\s*=\s*)?(%%?swarm\s.*)", line)
            if found is None:
                return {"completions": [], "suppress": False}
            commands = self._cell if found[1].startswith("%%") else self._line
            fragment = re.split(r"\s", found[1])[-1]
            words = commands.complete(found[1])
            if re.match(r"%swarm\s+revoke\s", found[1]):
                words = self._member_names() + words
            fitting = [word for word in words if word.startswith(fragment)]
            completions = [SimpleCompletion(word, type="swarm") for word in fitting]
            return {"completions": completions, "matched_fragment": fragment, "suppress": True}

        return match

    def _run(self, commands: CommandLine, line: str, cell: str | None) -> Any:
        try:
            arguments = commands.parse(line)
        except HelpShown:
            return None
        if arguments.command == "help":
            return commands.show_help(arguments.about)
        if arguments.command == "generate":
            arguments.prompt = text_of(arguments.prompt, line) if cell is None else cell.strip("\n")
            if not arguments.prompt and not arguments.widget:
                commands.commands["generate"].error("the following arguments are required: TEXT")
        if arguments.command in ("lens", "privacy"):
            arguments.text = text_of(arguments.text, line)
        try:
            return getattr(self, f"_{arguments.command}")(arguments)
        except SwarmError as error:
            text = f"{type(error).__name__}: {error} [{error.reference}]"
            raise UsageError(text) from error

    def _connect(self, arguments: argparse.Namespace) -> None:
        self._warmup.wait()
        from swarm_notebook.connecting import connect

        options = {"model": arguments.model, "dtype": arguments.dtype, "timeout": arguments.timeout}
        options["compression"], options["own"] = arguments.compression, arguments.own
        options["verify"], options["device"] = arguments.verify, arguments.device
        given = {key: value for key, value in options.items() if value is not None}
        before = self._current()
        swarm = connect(arguments.peers or None, lan=arguments.lan, **given)
        self.shell.push({"model": swarm.model, "tokenizer": swarm.tokenizer, "swarm": swarm})
        if before is not None:
            before.disconnect()
        self._store(arguments.output, swarm)
        status = swarm.status()
        print(f"{status.title}: {status.headline}")
        print("Ready to use: model, tokenizer, swarm")

    def _status(self, arguments: argparse.Namespace) -> Any:
        return self._store(arguments.output, self._need().status())

    def _route(self, arguments: argparse.Namespace) -> Any:
        return self._store(arguments.output, self._need().route())

    def _own(self, arguments: argparse.Namespace) -> None:
        swarm = self._need()
        swarm.own(arguments.blocks)
        self._say_home(swarm)

    def _release(self, arguments: argparse.Namespace) -> None:
        swarm = self._need()
        swarm.release(arguments.blocks or None)
        self._say_home(swarm)

    @staticmethod
    def _say_home(swarm: Swarm) -> None:
        blocks = ", ".join(map(str, swarm.owned))
        print(f"At home: blocks {blocks}" if blocks else "At home: no blocks")

    def _map(self, arguments: argparse.Namespace) -> Any:
        swarm = self._need()
        from swarm_notebook.widgets import SwarmMap

        return self._store(arguments.output, SwarmMap(swarm))

    def _lens(self, arguments: argparse.Namespace) -> Any:
        swarm = self._need()
        from swarm_notebook.widgets import LensWidget

        lens = self._made(LensWidget, swarm, arguments.text, token=arguments.token)
        return self._store(arguments.output, lens)

    def _privacy(self, arguments: argparse.Namespace) -> Any:
        found = self._need().privacy(arguments.text, tokens=arguments.tokens)
        return self._store(arguments.output, found)

    def _monitor(self, arguments: argparse.Namespace) -> Any:
        swarm = self._need()
        from swarm_notebook.widgets import TrainingMonitor

        monitor = TrainingMonitor(swarm, total=arguments.total)
        self.shell.push({"monitor": monitor})
        return self._store(arguments.output, monitor)

    def _serve(self, arguments: argparse.Namespace) -> Any:
        self._warmup.wait()
        from swarm_notebook.widgets import ServePanel

        names = ("dtype", "device", "bits", "memory", "threads", "name", "listen")
        given = {key: getattr(arguments, key) for key in names}
        if arguments.private and arguments.initial_peers:
            raise UsageError(
                "--private starts a swarm and --initial-peers joins one: give only one"
            )
        alone = bool(arguments.initial_peers) or arguments.private
        swarm = None if alone else self._current()
        panel = ServePanel(
            arguments.model,
            blocks=arguments.blocks,
            swarm=swarm,
            initial_peers=arguments.initial_peers,
            private=arguments.private,
            lan=arguments.lan,
            **{key: value for key, value in given.items() if value is not None},
        )
        if arguments.blocks is not None or arguments.memory is not None:
            panel.begin()
        return self._store(arguments.output, panel)

    def _book(self, name: str | None) -> LocalSwarm | Authority:
        """The private swarm that is meant: one of this notebook, else one of this machine."""
        self._warmup.wait()
        from swarm_notebook.local.swarm import LocalSwarm
        from swarm_notebook.net.membership.authority import begun_here

        found = self.shell.user_ns.get(name) if name is not None else None
        if isinstance(found, LocalSwarm):
            return found
        begun = LocalSwarm.private_here() if name is None else []
        if len(begun) > 1:
            raise UsageError(
                f"this notebook has started {len(begun)} private swarms; name the variable of one "
                "with --swarm"
            )
        return begun[0] if begun else begun_here(name)

    def _members(self, arguments: argparse.Namespace) -> None:
        members = self._book(arguments.swarm).members()
        if arguments.output is None:
            print("\n".join(map(str, members)) or "nobody has joined yet")
        self._store(arguments.output, members)

    def _revoke(self, arguments: argparse.Namespace) -> None:
        for member in self._book(arguments.swarm).revoke(arguments.member):
            print(member)

    def _member_names(self) -> list[str]:
        """For Tab: who could be revoked; nobody while the packages for it are not imported."""
        if not hasattr(sys.modules.get("swarm_notebook.swarm"), "Swarm"):
            return []
        try:
            return [one.name for one in self._book(None).members() if not one.revoked]
        except (SwarmError, UsageError):
            return []

    def _invite(self, arguments: argparse.Namespace) -> None:
        book = self._book(arguments.swarm)
        invitation = str(
            book.invite(arguments.role, expires=arguments.expires, uses=arguments.uses)
        )
        if arguments.output is None:
            print(invitation)
        self._store(arguments.output, invitation)

    def _plan(self, arguments: argparse.Namespace) -> Any:
        self._warmup.wait()
        from swarm_notebook.planning.plan import machines_of, plan

        names = ("context", "sessions", "bits", "link")
        options = {name: getattr(arguments, name) for name in names}
        machines = machines_of(arguments.machine, measured=arguments.this_machine)
        return self._store(arguments.output, plan(arguments.model, machines, **options))

    def _chat(self, arguments: argparse.Namespace) -> Any:
        swarm = self._need()
        from swarm_notebook.widgets import ChatWidget

        options = _sampling(arguments) | {"seed": arguments.seed}
        if arguments.steer is not None:
            options |= {"steer": self._vector(arguments.steer), "strength": arguments.strength}
        chat = self._made(ChatWidget, swarm, system=arguments.system, **options)
        self.shell.push({"chat": chat})
        return self._store(arguments.output, chat)

    def _vector(self, name: str) -> SteeringVector:
        """A variable of the notebook, or what a file holds."""
        from swarm_notebook.probing.steering import SteeringVector, load_vector

        found = self.shell.user_ns.get(name)
        if isinstance(found, SteeringVector):
            return found
        if not Path(name).is_file():
            raise UsageError(f"--steer: {name!r} is neither a SteeringVector nor a file of one")
        vector: SteeringVector = self._made(load_vector, name)
        return vector

    def _generate(self, arguments: argparse.Namespace) -> Any:
        if arguments.widget:
            return self._generate_widget(arguments)
        swarm = self._need()
        if arguments.seed is not None:
            from transformers import set_seed

            set_seed(arguments.seed)
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        from swarm_notebook.writing.adapters import adapters

        names, on = adapters(swarm.model)
        if names and on:
            print(f"[with adapter {', '.join(names)}]")
        try:
            swarm.generate(
                arguments.prompt, chat=not arguments.raw, stream=show, **_sampling(arguments)
            )
        except KeyboardInterrupt:
            # Without the way through the model, which takes a notebook a second to print.
            raise KeyboardInterrupt("generation stopped; the text so far is kept") from None
        finally:
            if pieces:
                print()
            self._store(arguments.output, "".join(pieces))
        return None

    def _generate_widget(self, arguments: argparse.Namespace) -> Any:
        swarm = self._need()
        from swarm_notebook.widgets import GenerateWidget

        options = _sampling(arguments) | {"seed": arguments.seed}
        template = getattr(swarm.tokenizer, "chat_template", None)
        chat = bool(template) and not arguments.raw
        widget = self._made(GenerateWidget, swarm, arguments.prompt, chat=chat, **options)
        if arguments.prompt:
            widget.run()
        return self._store(arguments.output, widget)

    @staticmethod
    def _made(kind: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A widget; what it says of wrong arguments is one line."""
        try:
            return kind(*arguments, **options)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _disconnect(self, arguments: argparse.Namespace) -> None:
        swarm = self._need()
        mine = {"model": swarm.model, "tokenizer": swarm.tokenizer, "swarm": swarm}
        swarm.disconnect()
        self.shell.drop_by_id(mine)

    def _current(self) -> Swarm | None:
        """The notebook's variable ``swarm``, if it is one."""
        # Not imported (or not yet: the warm-up may be at it) means that nobody can have one.
        kind = getattr(sys.modules.get("swarm_notebook.swarm"), "Swarm", ())
        found = self.shell.user_ns.get("swarm")
        return found if isinstance(found, kind) else None

    def _need(self) -> Swarm:
        swarm = self._current()
        if swarm is None:
            raise UsageError("not connected: run %swarm connect first")
        return swarm

    def _store(self, name: str | None, value: Any) -> Any:
        """Put the result where ``-o`` says, else hand it back for display."""
        if name is None:
            return value
        self.shell.push({name: value})
        return None


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of transformers' ``generate`` that were asked for."""
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature == 0:
        return options | {"do_sample": False}
    chosen = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    options |= {key: value for key, value in chosen.items() if value is not None}
    if arguments.sample or len(options) > 1:
        options["do_sample"] = True
    return options
