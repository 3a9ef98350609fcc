"""Heavy imports in the background, while the user reads and types (contract C8).

torch, transformers and hivemind take seconds to import. After the cell with ``%load_ext`` a thread
imports what `connect` will need. Two threads must not import the same packages at once: theirs are
full of cycles, and Python resolves a lock cycle by failing one of the imports. So whoever is about
to import something (a cell with an import in it, a ``%swarm`` command) first waits for the thread.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm_notebook.progress import Waiting

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionInfo, ExecutionResult, InteractiveShell

logger: logging.Logger = logging.getLogger(__name__)

MODULES = (
    "swarm_notebook.connecting",
    "swarm_notebook.local.swarm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


class Warmup:
    """One background import of `MODULES`."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="swarm-notebook-warmup", daemon=True)

    def plan(self, shell: InteractiveShell) -> None:
        """Begin as soon as the running cell ends; it may have imports of its own."""
        self._events = shell.events
        self._events.register("post_run_cell", self._after_cell)

    def cancel(self) -> None:
        """Leave the shell's cells alone; imports that have begun cannot be undone."""
        for name, function in self._hooks():
            if function in self._events.callbacks[name]:
                self._events.unregister(name, function)

    def wait(self) -> None:
        """Return when the imports are done; says what it waits for if that takes long."""
        if self._thread.ident is None:
            self._begin()
        with Waiting("Importing torch, transformers, hivemind"):
            self._thread.join()

    def _hooks(self) -> list[tuple[str, Callable[..., None]]]:
        return [("post_run_cell", self._after_cell), ("pre_run_cell", self._before_cell)]

    def _begin(self) -> None:
        self.cancel()
        self._events.register("pre_run_cell", self._before_cell)
        self._thread.start()

    def _after_cell(self, _result: ExecutionResult) -> None:
        self._begin()

    def _before_cell(self, info: ExecutionInfo) -> None:
        if not self._thread.is_alive():
            self.cancel()
        elif "import" in str(info.raw_cell):
            self.wait()

    @staticmethod
    def _run() -> None:
        for module in MODULES:
            try:
                importlib.import_module(module)
            except ImportError as error:
                # Whoever needs it will import it again and see this error in full.
                logger.debug("cannot import %s: %s", module, error)
