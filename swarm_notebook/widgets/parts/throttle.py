"""Work that is asked for often and done seldom: many changes, one update of the views.

`Throttle.ask` may be called from any thread and returns at once. The first call after a pause is
answered at once, those that follow by one call per period, and the last one always. The thread that
does it lives only while there is something to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from swarm_notebook.progress import cell_thread

logger: logging.Logger = logging.getLogger(__name__)

PERIOD = 0.04  # 25 times a second: an eye sees no steps
_PATIENCE = 1.0  # how long the thread waits for more before it ends


class Throttle:
    """Calls ``work`` soon after each `ask`, but not more often than once per period.

    Args:
        work: what to do; what it raises is logged.
        period: seconds from one call to the next, unless ``work`` returns more.
    """

    def __init__(self, work: Callable[[], float | None], period: float = PERIOD):
        self._work, self._period = work, period
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Let the work be done soon."""
        self._asked.set()
        with self._lock:
            if self._thread is None:
                self._thread = cell_thread("throttle", self._loop)
                self._thread.start()

    def _loop(self) -> None:
        while self._more():
            self._asked.clear()
            more = None
            try:
                more = self._work()
            except Exception:  # the thread has to live: without it, no view would change again
                logger.exception("a view was not updated")
            time.sleep(max(self._period, more or 0.0))

    def _more(self) -> bool:
        if self._asked.wait(_PATIENCE):
            return True
        with self._lock:
            if not self._asked.is_set():
                self._thread = None
                return False
        return True
