"""What all widgets have in common.

    class Gauge(Widget, module="gauge"):       # js/src/gauge.js and gauge.css
        level = traitlets.Float().tag(sync=True)

        @action
        def reset(self, to: float) -> None:    # the script calls act(model, "reset", { to: 0 })
            self.update(level=to)

- **Traits** carry everything that is shown. Code on any thread changes them with `Widget.update`,
  which sends all that changed as one message.
- **Actions** are what a user asks for with a button or key: a message, not a trait, because a
  saved notebook must not ask again when it is opened.
- **Errors** of actions, and of whatever runs inside `Widget.showing_errors`, are logged and stand
  in a red panel above the widget until the user closes it.
- **Signs of life**: a view whose kernel is gone, or whose swarm the notebook has left (`gone`),
  says so and greys out, see `heart`.
- **Display**: the widget for front ends that can, else its last picture as HTML without scripts
  (GitHub, nbconvert), else one line of text that is the same in every run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import anywidget
import traitlets

from swarm_notebook.widgets.parts import assets
from swarm_notebook.widgets.parts.heart import keep_alive
from swarm_notebook.widgets.parts.traits import String

if TYPE_CHECKING:
    from swarm_notebook.swarm import Swarm

logger: logging.Logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def action(method: Method) -> Method:
    """Let the widget's script call this method, with keyword arguments."""
    method.is_widget_action = True  # type: ignore[attr-defined]
    return method


class Widget(anywidget.AnyWidget):
    """Base class of the widgets; unknown keywords are a TypeError."""

    error: String = traitlets.Unicode(help="What went wrong last; empty if nothing.").tag(sync=True)
    NEEDS_SWARM: ClassVar[bool] = True  # whether a view is over when the notebook leaves its swarm
    GO_ON: ClassVar[str] = "connect again (%swarm connect) and run this cell again"

    gone: String = traitlets.Unicode(help="Why this cannot go on; empty if it can.").tag(sync=True)

    def __init_subclass__(cls, *, module: str | None = None, **options: Any) -> None:
        if module is not None:
            cls._esm, cls._css = assets.script(module), assets.style(module)
        super().__init_subclass__(**options)

    def __init__(self, **options: Any) -> None:
        if unknown := sorted(options.keys() - set(self.class_trait_names())):
            raise TypeError(f"{type(self).__name__}() has no argument {', '.join(unknown)}")
        self._updating = threading.RLock()
        super().__init__(**options)
        self.on_msg(self._act)
        keep_alive(self)

    def beat(self) -> None:
        """Tell the views that Python is there, and whether the swarm still is."""
        swarm: Swarm | None = getattr(self, "_swarm", None) if self.NEEDS_SWARM else None
        if swarm is not None and not swarm.connected and not self.gone:
            self.update(
                gone=f"This notebook has disconnected from the swarm. To continue, {self.GO_ON}."
            )
        # Not `self.send`: what a chat sends is a message of its user.
        anywidget.AnyWidget.send(self, {"alive": True})

    def summary(self) -> str:
        """One line on what this is, the same in every run: no timings, no addresses."""
        return ""

    def picture(self) -> str:
        """The last state as HTML that needs neither scripts nor a kernel."""
        return f"<p>{escape(repr(self))}</p>"

    def close(self) -> None:
        """End the views; the picture stays."""
        super().close()
        self.__dict__.pop("_repr_mimebundle_", None)  # ipywidgets has put None there

    def update(self, **values: Any) -> None:
        """Set traits, from any thread; the views get what changed in one message."""
        with self._updating, self.hold_sync():
            for name, value in values.items():
                setattr(self, name, value)

    def send_state(self, key: Any = None) -> None:
        """As every widget's; what is read is sent before anything changes.

        A page that is opened asks for the state on the main thread. Without this an update of
        another thread could be overtaken by the older state, which would then stay on the page.
        """
        with self._updating:
            super().send_state(key)

    @contextmanager
    def showing_errors(self) -> Iterator[None]:
        """Whatever fails inside stands in the widget's red panel afterwards, and in the log."""
        try:
            yield
        except Exception as error:
            logger.exception("%s failed", type(self).__name__)
            self.update(error=f"{type(error).__name__}: {error}")

    @action
    def dismiss(self) -> None:
        """Close the red panel."""
        self.update(error="")

    def _act(self, _widget: object, content: object, _buffers: object) -> None:
        """A message of the script: one of our actions."""
        with self.showing_errors():
            if not isinstance(content, dict) or not isinstance(content.get("action"), str):
                raise ValueError(f"a message that is no action: {str(content)[:100]}")
            method = getattr(type(self), content["action"], None)
            if not getattr(method, "is_widget_action", False):
                raise ValueError(f"{type(self).__name__} has no action {content['action'][:100]!r}")
            arguments = content.get("with", {})
            getattr(self, content["action"])(**arguments)

    def __repr__(self) -> str:
        summary = self.summary()
        return f"<{type(self).__name__}{': ' if summary else ''}{summary}>"

    def _repr_html_(self) -> str:
        return self.picture()

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = {}, {}
        if self.comm is not None:  # it has not been closed
            data, metadata = super()._repr_mimebundle_(**options) or ({}, {})
        return {**data, "text/plain": repr(self), "text/html": self.picture()}, metadata
