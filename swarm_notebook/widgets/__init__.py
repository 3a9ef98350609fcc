"""Live views for notebooks, each one anywidget: a Python class here, an ES module under ``js/src``.

    from swarm_notebook.widgets import SwarmMap
    SwarmMap(swarm)                       # or %swarm map

A widget is a view of public Python objects: whatever it shows or does can be had without it. Its
state is in traits, so that several views of one widget agree, a reload of the page keeps it and a
saved notebook shows it without a kernel. What takes long runs on threads of the widget, never in
the kernel's main thread, which may be busy with a cell.

To add one, ``MyWidget``:

1. ``js/src/mine.js`` exports ``default { render }`` and builds on `js/src/dom.js`; its looks are in
   ``js/src/mine.css``, in the colours of ``theme.css``. Test it in ``js/tests/mine.test.js``.
2. ``widgets/mine.py`` defines ``class MyWidget(Widget, module="mine")`` with typed traits,
   ``summary`` (one stable line) and ``picture`` (HTML that shows the same without a script). See
   `base` for what a widget gets from there.
3. Enter its name below, test it in ``tests/unit/widgets/test_mine.py``, and give it a magic.

Importing this package is light; a widget's module is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm_notebook.lazy import lazy_names

if TYPE_CHECKING:
    from swarm_notebook.widgets.chat import ChatWidget as ChatWidget
    from swarm_notebook.widgets.generate import GenerateWidget as GenerateWidget
    from swarm_notebook.widgets.lens import LensWidget as LensWidget
    from swarm_notebook.widgets.map import SwarmMap as SwarmMap
    from swarm_notebook.widgets.monitor import TrainingMonitor as TrainingMonitor
    from swarm_notebook.widgets.serve import ServePanel as ServePanel

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ChatWidget": "chat",
        "GenerateWidget": "generate",
        "LensWidget": "lens",
        "ServePanel": "serve",
        "SwarmMap": "map",
        "TrainingMonitor": "monitor",
    },
)
__all__ = [
    "ChatWidget",
    "GenerateWidget",
    "LensWidget",
    "ServePanel",
    "SwarmMap",
    "TrainingMonitor",
]
