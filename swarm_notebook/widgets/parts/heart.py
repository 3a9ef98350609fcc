"""Signs of life for the views: a view that hears none says that its kernel is gone, and greys out.

One thread for all open widgets sends each of them a message every few seconds, also while a cell is
running. It is no trait: nothing of it is saved. The thread ends with the last widget.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Any, Protocol

logger: logging.Logger = logging.getLogger(__name__)

# `js/src/dom.js` waits for four of these: a cell that holds Python's lock for so long is rare.
BEAT_SECONDS = 3.0


class Alive(Protocol):
    """What has a heart: a widget. Its comm is None once it is closed."""

    @property
    def comm(self) -> Any: ...

    def beat(self) -> None:
        """Send the views a sign of life."""


_open: weakref.WeakSet[Alive] = weakref.WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def keep_alive(widget: Alive) -> None:
    """Let the views of a widget know that Python is there, until it is closed."""
    global _thread
    with _lock:
        _open.add(widget)
        if _thread is None:
            _thread = threading.Thread(target=_run, name="swarm_notebook-heart", daemon=True)
            _thread.start()


def _run() -> None:
    while _some_open():
        time.sleep(BEAT_SECONDS)
        for widget in list(_open):
            try:
                widget.beat()
            except Exception:
                logger.debug("a sign of life was not sent", exc_info=True)
            del widget  # or this thread would hold it until the next beat


def _some_open() -> bool:
    global _thread
    with _lock:
        for widget in [one for one in _open if one.comm is None]:
            _open.discard(widget)
        if not _open:
            _thread = None
        return bool(_open)
