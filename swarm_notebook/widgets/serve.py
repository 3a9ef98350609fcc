"""The serve panel: lend this machine's memory to a swarm, from a notebook.

    ServePanel("org/name", swarm=swarm)          # or %swarm serve MODEL

It is a view of a `Lending`, which does the work in a process of its own. A thread of the panel asks
that process once a second how it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import traitlets

from swarm_notebook.devices import device_named, dtype_on
from swarm_notebook.local.lending import Lending
from swarm_notebook.report.formatting import model_title, number
from swarm_notebook.report.html import facts, head, view
from swarm_notebook.widgets.parts.base import Widget, action
from swarm_notebook.widgets.parts.pulse import start_pulse
from swarm_notebook.widgets.parts.traits import Real, String, Whole

logger: logging.Logger = logging.getLogger(__name__)

PERIOD = 0.5  # from one question to the server process to the next


class ServePanel(Widget, module="serve"):
    """Choose blocks, start and stop a server of this machine, and see what it does for others.

    Args:
        lending: what to start and stop; None makes one of the other arguments.
        model, blocks, swarm, initial_peers, dtype, device, bits, memory, threads, name, listen,
            private, lan: as for `Lending`.

    Attributes:
        title: the model's name.
        num_blocks: how many blocks it has.
        start, end: the blocks to hold; a view may change them until the server starts.
        state: one of `lending.STATES`, or ``stopping``.
        weights: bytes read and all bytes of the weights.
        needs: bytes of each block's weights; empty until that is known.
        addresses: where the server listens; none for a private swarm, where they are of no use.
        facts: sessions open now; sessions, requests and tokens served; cache tokens free and of
            all. Empty unless the server answers.
        since: when it began to serve, in seconds of Unix time.
        log: the end of its log.
    """

    title: String = traitlets.Unicode().tag(sync=True)
    num_blocks: Whole = traitlets.Int().tag(sync=True)
    start: Whole = traitlets.Int().tag(sync=True)
    end: Whole = traitlets.Int().tag(sync=True)
    state: String = traitlets.Unicode("stopped").tag(sync=True)
    weights: traitlets.List[int] = traitlets.List([0, 0]).tag(sync=True)
    needs: traitlets.List[int] = traitlets.List().tag(sync=True)
    addresses: traitlets.List[str] = traitlets.List().tag(sync=True)
    facts: traitlets.Dict[str, int] = traitlets.Dict().tag(sync=True)
    since: Real = traitlets.Float().tag(sync=True)
    log: String = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, model: Any = None, *, lending: Lending | None = None, **options: Any
    ) -> None:
        traits = {name: options.pop(name) for name in [*options] if name in _LAYOUT}
        self._turning = threading.Lock()
        self._turns = 0  # starts and stops that were asked for and are not done
        self.lending: Lending = lending or Lending(model, **options)
        start, end = self.lending.blocks
        super().__init__(
            title=model_title(self.lending.model),
            num_blocks=self.lending.num_blocks,
            start=start,
            end=end,
            **traits,
        )
        start_pulse(self._beat, PERIOD)
        threading.Thread(target=self._measure, name="swarm_notebook-needs", daemon=True).start()

    def summary(self) -> str:
        """The blocks and the model; whether they are served just now varies."""
        return f"blocks {self.start}:{self.end} of {self.title}"

    def picture(self) -> str:
        """The state and the counts."""
        known = self.facts
        cells = {
            "blocks": f"{self.start}:{self.end} of {self.num_blocks}",
            "state": self.state,
            "sessions served": number(known.get("sessions_served")),
            "requests served": number(known.get("requests_served")),
            "tokens served": number(known.get("tokens_served")),
        }
        return view(head(self.title, "") + facts(cells.items()))

    @action
    def begin(self) -> None:
        """Start the server with the blocks chosen."""
        self.lending.blocks = (self.start, self.end)
        self._turn(self.lending.start, error="", state="starting")

    @action
    def stop(self) -> None:
        """Stop the server; its requests in flight are answered first."""
        self._turn(self.lending.stop, state="stopping")

    def close(self) -> None:
        """Stop the server and end the views."""
        super().close()
        # ipywidgets calls this, too, for a panel whose arguments were refused.
        lending: Lending | None = getattr(self, "lending", None)
        if lending is not None:
            with self._turning:
                lending.stop()

    def _measure(self) -> None:
        """Work out what the blocks will take; importing the class of the model takes a while."""
        from swarm_notebook.planning.shape import shape_of

        try:
            shape = shape_of(self.lending.config, name=self.title)
        except Exception:  # it is a help, and whatever is wrong with the model is said at the start
            logger.debug("what the blocks take is not known", exc_info=True)
            return
        lending = self.lending
        dtype = getattr(torch, lending.dtype, None)  # "auto" is none of torch's
        if dtype is None:
            device, packed = device_named(lending.device), lending.bits is not None
            dtype = dtype_on(device, lending.config.dtype, packed=packed)
        item: int = dtype.itemsize
        matrix = item if self.lending.bits is None else self.lending.bits / 8
        needs = [int(block.matrices * matrix + block.vectors * item) for block in shape.blocks]
        self.update(needs=needs)

    def _turn(self, work: Callable[[], None], **shown: str) -> None:
        """Start or stop beside the kernel's main thread, one after the other."""

        def run() -> None:
            with self._turning:
                with self.showing_errors():
                    work()
                with self._updating:
                    self._turns -= 1
                self._look()

        with self._updating:
            self._turns += 1
            self.update(**shown)
        threading.Thread(target=run, name="swarm_notebook-serve", daemon=True).start()

    def _beat(self) -> bool:
        if self._turning.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._turning.release()
        return True

    def _look(self) -> None:
        lending = self.lending
        state, facts = lending.state, lending.facts() or {}
        changed: dict[str, Any] = {
            "weights": list(lending.weights),
            # An invitation would be a secret, which a notebook's file should not hold unasked.
            "addresses": [] if lending.private else lending.addresses,
            "facts": {name: facts[name] for name in _SHOWN if isinstance(facts.get(name), int)},
        }
        if state != self.state or state in {"starting", "loading"}:
            changed["log"] = lending.log_tail()
        if state == "serving" and self.state != "serving":
            changed["since"] = time.time()
            changed["start"], changed["end"] = lending.blocks
        if state == "failed" and self.state != "failed":
            changed["error"] = "the server stopped unexpectedly; its log says why"
        with self._updating:
            # Asking took its time: a button that was pressed meanwhile is what counts.
            if not self._turns:
                self.update(state=state, **changed)


_SHOWN = (
    "sessions",
    "sessions_served",
    "requests_served",
    "tokens_served",
    "cache_tokens_available",
    "cache_tokens_total",
)
_LAYOUT = ("layout", "tooltip", "tabbable")
