"""Saying what is waited for, once it takes longer than a moment (contract C9).

    with Waiting("Joining the swarm") as waiting:
        ...
        waiting.say("Loading embeddings and head")

A thread of its own shows and refreshes the line, so whatever runs inside may block as it likes. In
a notebook it stands in the cell that waits, in a terminal on standard error, and goes away at the
end. What is over in a moment shows nothing at all.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

SHOW_AFTER_SECONDS = 1.0
REFRESH_SECONDS = 0.25
PLAIN = "{desc} [{elapsed}]"
COUNTED = "{desc}: {n_fmt} of {total_fmt} {unit} [{elapsed}]"


class Waiting:
    """Shows `what` while its context lasts.

    Args:
        what: a few words.
        total: how many there are of what is counted, if anything is.
        unit: what is counted.
        count: says how many of the total are done; called by the thread that shows it.
        after: seconds before anything is shown.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "",
        count: Callable[[], int] = lambda: 0,
        after: float = SHOW_AFTER_SECONDS,
    ) -> None:
        self._what, self._total, self._unit, self._after = what, total, unit, after
        self._count = count
        self._over = threading.Event()
        context = contextvars.copy_context()  # the output belongs to the cell that waits
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name="swarm_notebook-waiting", daemon=True
        )

    def say(self, what: str) -> None:
        """From now on wait for something else."""
        self._what = what

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if self._over.wait(self._after):
            return
        from tqdm.auto import tqdm

        form = PLAIN if self._total is None else COUNTED
        bar: Any = tqdm(
            desc=self._what, total=self._total, unit=self._unit, bar_format=form, leave=False
        )
        with bar:
            while not self._over.wait(REFRESH_SECONDS):
                bar.n = self._count()
                bar.set_description_str(self._what)  # refreshes
