"""A pulse for widgets: a daemon thread that calls a method of one again and again.

It runs beside the kernel's main thread, so that a widget keeps up while a cell is running. It
holds its widget weakly and ends with it: when it is garbage, when it is closed, or when the method
returns False.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm_notebook.progress import cell_thread

if TYPE_CHECKING:
    from swarm_notebook.widgets.parts.base import Widget


def start_pulse(beat: Callable[[], bool], period: float) -> threading.Thread:
    """Call `beat`, a widget's bound method, every `period` seconds; see above for the end.

    What `beat` raises is shown by the widget and ends the pulse.
    """
    thread = cell_thread("pulse", _run, weakref.WeakMethod(beat), period)
    thread.start()
    return thread


def _run(method: weakref.WeakMethod[Callable[[], bool]], period: float) -> None:
    rest = threading.Event()
    while _beat(method):
        rest.wait(period)


def _beat(method: weakref.WeakMethod[Callable[[], bool]]) -> bool:
    """One beat; whether there is to be another."""
    beat = method()
    if beat is None:
        return False
    widget: Widget = beat.__self__  # type: ignore[attr-defined]
    if widget.comm is None:
        return False
    with widget.showing_errors():
        return beat()
    return False  # type: ignore[unreachable]  # after an error, which `showing_errors` takes
