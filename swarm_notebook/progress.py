"""Saying what is waited for, once it takes longer than a moment (contract C9).

    with Waiting("Joining the swarm") as waiting:
        ...
        waiting.say("Loading embeddings and head")

A thread of its own shows and refreshes the line, so whatever runs inside may block as it likes. In
a notebook it stands in the cell that waits, in a terminal on standard error, and goes away at the
end. What is over in a moment shows nothing at all.

In a notebook the line is an output that begins and ends empty and is only updated in between: no
stream, no widget, no text of its own. So a saved notebook does not keep it, and a comparison of a
cell's outputs with a fresh run (nbval) is the same on a slow machine and on a quick one.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable
from html import escape
from typing import Any, Self

SHOW_AFTER_SECONDS = 1.0  # until then nobody wonders (Nielsen's limit for an unbroken thought)
REFRESH_SECONDS = 0.25


def cell_thread(name: str, work: Callable[..., object], *arguments: Any) -> threading.Thread:
    """A thread to be started, whose output belongs to the cell that is running now."""
    run = contextvars.copy_context().run
    name = f"swarm_notebook-{name}"
    return threading.Thread(target=run, args=(work, *arguments), name=name, daemon=True)


class Waiting:
    """Shows `what` while its context lasts.

    Args:
        what: a few words.
        total: how many there will be of what is counted, if that is known.
        unit: what is counted.
        count: says how many are done, if anything is counted; called by the thread that shows it.
        detail: says more, in a few words, or nothing; called by that thread as well.
        after: seconds before anything is shown.
        began: when that which is waited for did, by `time.monotonic`; None: with the context.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "",
        count: Callable[[], int] | None = None,
        detail: Callable[[], str] = lambda: "",
        after: float = SHOW_AFTER_SECONDS,
        began: float | None = None,
    ) -> None:
        self._what, self._total, self._unit, self._after = what, total, unit, after
        self._count, self._detail = count, detail
        self._began = began
        self._over = threading.Event()
        self._thread = cell_thread("waiting", self._run)

    def say(self, what: str) -> None:
        """From now on wait for something else."""
        self._what = what

    def __enter__(self) -> Self:
        if self._began is None:
            self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if self._over.wait(self._after):
            return
        shown = _CellLine() if _in_notebook() else _TerminalLine()
        try:
            while True:
                done = None if self._count is None else self._count()
                shown.show(self._line(done), done, self._total)
                if self._over.wait(REFRESH_SECONDS):
                    return
        finally:
            shown.clear()

    def _line(self, done: int | None) -> str:
        now = time.monotonic()
        seconds = int(now - (self._began or now))
        parts = [] if done is None else [f"{done}"]
        parts += [] if self._total is None else [f"of {self._total}"]
        amount = f": {' '.join([*parts, self._unit])}" if parts else ""
        detail = self._detail()
        return (
            f"{self._what}{amount}{', ' if detail else ''}{detail} "
            f"[{seconds // 60:02}:{seconds % 60:02}]"
        )


class _CellLine:
    """A line of the cell that is running, in any front end of a kernel."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str, done: int | None, total: int | None) -> None:
        bar = (
            ""
            if done is None or not total
            else f'<progress value="{done}" max="{total}"></progress> '
        )
        self._send({"text/plain": line, "text/html": f"<div>{bar}{escape(line)}</div>"})

    def clear(self) -> None:
        self._send({})

    def _send(self, data: dict[str, str]) -> None:
        from IPython.display import DisplayHandle

        if self._handle is None:
            self._handle = DisplayHandle()
            self._handle.display({}, raw=True)
        self._handle.update(data, raw=True)


class _TerminalLine:
    """A line of a terminal, on standard error."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(bar_format="{desc}", leave=False)

    def show(self, line: str, _done: int | None, _total: int | None) -> None:
        self._bar.set_description_str(line)

    def clear(self) -> None:
        self._bar.close()


def _in_notebook() -> bool:
    """Whether a kernel runs this code; IPython in a terminal has a shell without one."""
    ipython = sys.modules.get("IPython")  # if nobody has imported it, this is none
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")
