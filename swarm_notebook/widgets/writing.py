"""What the two widgets that write with a model have in common: the run, its settings, its facts.

The writing itself is `swarm_notebook.writing.Writer`, on a thread of its own. Whatever changes
there asks a second thread (`Throttle`) to tell the views; the kernel's main thread does nothing per
token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import traitlets

from swarm_notebook.errors import SwarmError
from swarm_notebook.report.formatting import model_title
from swarm_notebook.swarm import Swarm
from swarm_notebook.widgets.parts.base import Widget, action
from swarm_notebook.widgets.parts.pulse import start_pulse
from swarm_notebook.widgets.parts.throttle import Throttle
from swarm_notebook.widgets.parts.traits import AnyReal, Flag, MaybeWhole, String, Whole
from swarm_notebook.writing import Sampling, Vocabulary, Writer
from swarm_notebook.writing.adapters import adapters, switch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swarm_notebook.probing.steering import SteeringVector
    from swarm_notebook.report.cost import Bill
    from swarm_notebook.writing import Draft

TOKEN_COLUMNS = ["position", "id", "text", "probability", "alternatives"]
_QUOTED = 3  # tokens that show a place in a text
_WATCH_PERIOD = 0.25  # seconds: what Python knows is on the screen before anybody wonders
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "seed")


def token_rows(vocabulary: Vocabulary, draft: Draft) -> list[dict[str, Any]]:
    """The written tokens of a text as rows of `TOKEN_COLUMNS`."""
    return [
        {
            "position": position,
            "id": token.id,
            "text": vocabulary.show(token.id),
            "probability": token.probability,
            "alternatives": [(vocabulary.show(one), part) for one, part in token.alternatives],
        }
        for position, token in enumerate(list(draft.tokens))
    ]


class WritingWidget(Widget):
    """A model, how to sample from it, and the run that is going on.

    Args:
        target: a swarm, or a causal LM of transformers.
        tokenizer: for a model alone; a swarm has its own.
        steer: a vector that is added to the states of a block while this widget writes, `strength`
            times; the notebook's own passes are not touched.
        options: of `Sampling`, and other traits. What is not given is taken from the model's own
            generation config.

    Attributes:
        writer: what writes; its draft has the tokens.
        state: ``idle``, ``reading`` the prompt, ``writing`` or ``stopping``.
        note: what became of the last run, in a few words.
        stats: how fast the last run was: ``tokens``, ``computed`` (prompt tokens that had to be
            read), ``first`` (seconds to the first token), ``rate`` (tokens per second), ``shares``
            (pairs of a server's name and its part of the time) and ``lost`` (servers).
        preview: what the next run will take, for a swarm.
        obstacle: why the next run cannot begin at once, if that is known.
        bill: what the last one took.
        waiting: for which servers the run waits, if it does: ``text``, ``since`` (Unix time) and
            ``limit`` (seconds).

    Raises:
        ValueError: there is no tokenizer, or a sampling argument is out of range.
        TypeError: an option is unknown.
    """

    title: String = traitlets.Unicode().tag(sync=True)
    steering: String = traitlets.Unicode(help="where a vector is added, if one is").tag(sync=True)
    strength: AnyReal = traitlets.CFloat(1.0, help="how many times the vector").tag(sync=True)
    adapters: traitlets.List[str] = traitlets.List(
        traitlets.Unicode(), help="PEFT's, in the model"
    ).tag(sync=True)
    adapters_on: Flag = traitlets.Bool(True).tag(sync=True)
    has_template: Flag = traitlets.Bool(help="the tokenizer has a chat template").tag(sync=True)
    do_sample: Flag = traitlets.Bool().tag(sync=True)
    temperature: AnyReal = traitlets.CFloat().tag(sync=True)
    top_p: AnyReal = traitlets.CFloat().tag(sync=True)
    top_k: Whole = traitlets.Int().tag(sync=True)
    max_new_tokens: Whole = traitlets.Int().tag(sync=True)
    seed: MaybeWhole = traitlets.Int(None, allow_none=True).tag(sync=True)
    state: String = traitlets.Unicode("idle").tag(sync=True)
    progress: traitlets.List[int] = traitlets.List(
        traitlets.Int(), help="tokens read, of how many"
    ).tag(sync=True)
    note: String = traitlets.Unicode().tag(sync=True)
    stats: traitlets.Dict[str, Any] = traitlets.Dict().tag(sync=True)
    preview: String = traitlets.Unicode().tag(sync=True)
    obstacle: String = traitlets.Unicode().tag(sync=True)
    bill: String = traitlets.Unicode().tag(sync=True)
    waiting: traitlets.Dict[str, Any] = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        target: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        steer: SteeringVector | None = None,
        **options: Any,
    ) -> None:
        swarm = target if isinstance(target, Swarm) else None
        model = target.model if isinstance(target, Swarm) else target
        found: Any = tokenizer or (swarm.tokenizer if swarm else None)
        if found is None:
            raise ValueError("tokenizer: the model comes without one; give it with tokenizer=…")
        self._steered, self._steering = 0.0, ExitStack()
        if steer is not None:
            model = self._steer(target, found, steer)
        self._swarm, self._model, self._tokenizer = swarm, model, found
        chosen = {name: options.pop(name) for name in SAMPLING if name in options}
        sampling = Sampling.of(model, **chosen)
        self._vocabulary = Vocabulary(found)
        self._estimated: tuple[Any, ...] = ()
        self._before: Bill | None = None
        # Runs that were begun, and those whose end the views know.
        self._runs = self._told = 0
        self._counting = threading.Condition()
        self._showing = threading.Lock()
        self._views = Throttle(self._show)
        self.writer: Writer = Writer(model, self._changed)
        name = swarm.name if swarm else str(model.config._name_or_path) or type(model).__name__
        super().__init__(
            title=model_title(name),
            has_template=bool(getattr(found, "chat_template", None)),
            steering="" if steer is None else f"steering, block {steer.block}",
            **{key: getattr(sampling, key) for key in SAMPLING},
            **options,
        )
        self._look_for_adapters()
        self.observe(lambda _: self._views.ask(), self._estimate_traits())
        self._views.ask()

    def _steer(self, target: Any, tokenizer: Any, vector: SteeringVector) -> Any:
        """A view of the model whose block adds the vector, as strongly as the run began with."""
        from swarm_notebook.probing.subject import Subject

        subject = Subject.of(target, tokenizer).twin()
        (block,) = subject.chosen([vector.block])

        def add(state: torch.Tensor) -> torch.Tensor:
            added = vector.vector.to(state.device, state.dtype)
            return state + self._steered * added if self._steered else state

        self._steering.enter_context(subject.editing(block, add))
        return subject.model

    def _wrong(self) -> dict[str, str]:
        """Names of servers whose answers were found wrong, by peer."""
        if self._swarm is None:
            return {}
        directory = self._swarm.connection.directory
        if not directory.health.wrong:
            return {}
        used = directory.telemetry.usage.by_peer()
        return {peer: used[peer].name for peer in list(directory.health.wrong) if peer in used}

    def _suspicion(self, draft: Draft, what: str) -> tuple[list[tuple[int, int]], str]:
        """Tokens of a text in which servers had a part that were found wrong; and what to say."""
        wrong = self._wrong()
        runs = draft.touched(wrong) if wrong else []
        if not runs:
            return [], ""
        start = runs[0][0]
        peers = frozenset().union(*(draft.tokens[at].servers for at, _ in runs))
        names = ", ".join(sorted({name for peer, name in wrong.items() if peer in peers}))
        words = "".join(map(self._vocabulary.show, draft.written[start : start + _QUOTED])).strip()
        where = f"From token {start + 1} (“{words}”) on" if start else "From its first token on"
        return runs, f"{names} was found wrong. {where}, {what}"

    @property
    def sampling(self) -> Sampling:
        """What the controls say.

        Raises:
            ValueError: a value is out of range; the message names it.
        """
        return Sampling(**{name: getattr(self, name) for name in SAMPLING})

    @action
    def stop(self) -> None:
        """End the run after the present token; asked twice, at once. Text and cache are kept."""
        self.writer.stop()

    @action
    def switch_adapters(self, on: bool) -> None:
        """Let the adapters in the model take part or not, here and in all that use the model.

        Raises:
            Busy: a run is going on.
        """
        self.writer.forget()
        switch(self._model, on)
        self._look_for_adapters()

    def beat(self) -> None:
        """As every widget's; an adapter that has come or gone is shown, too."""
        super().beat()
        if not self.writer.running:
            self._look_for_adapters()

    @property
    def _written(self) -> str:
        """The text that was written, without special tokens."""
        written = self.writer.draft.written
        return str(self._tokenizer.decode(written, skip_special_tokens=True))

    def _ids_of_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """What the model reads before it answers, by the tokenizer's chat template."""
        encoded = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
        return list(encoded["input_ids"])

    def _look_for_adapters(self) -> None:
        names, on = adapters(self._model)
        if (names, on) != (self.adapters, self.adapters_on):
            self.update(adapters=names, adapters_on=on)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the run to end and the views to know; whether it has.

        An interrupt of the kernel stops the run and is raised.
        """
        runs = self._runs
        if not self.writer.wait(timeout):
            return False
        with self._counting:
            return self._counting.wait_for(lambda: self._told >= runs, timeout)

    def close(self) -> None:
        """End the run and the views; the text stays."""
        if "writer" in self.__dict__:  # else it is one whose arguments were wrong
            self.writer.close()
            self._steering.close()
        super().close()

    def _start(self, begin: Callable[[], None]) -> None:
        """Begin a run; what `begin` raises means that there is none."""
        before = self._swarm.bill() if self._swarm is not None else None
        with self._counting:
            self._look_for_adapters()
            if self.steering and self.strength != self._steered:
                self.writer.forget()  # its keys and values are those of another strength
                self._steered = self.strength
            begin()
            self._before = before
            self._runs += 1
        if self._swarm is not None:
            start_pulse(self._watch, _WATCH_PERIOD)

    def _watch(self) -> bool:
        """Tell the views what a run waits for; until it has ended."""
        running = self.writer.running
        waiting = self._shortage() if running else {}
        if waiting != self.waiting:
            self.update(waiting=waiting)
        return running

    def _shortage(self) -> dict[str, Any]:
        shortages = list(self._swarm.connection.directory.shortages) if self._swarm else []
        if not shortages:
            return {}
        one = shortages[0]
        had = f" ({', '.join(one.had)} had them until now)" if one.had else ""
        text = f"No server holds {one.blocks}{had}; asking the swarm every second"
        return {"text": text, "since": one.since, "limit": one.limit}

    def _changed(self) -> None:
        """The writer's state or text has changed; called in its thread as well."""
        self._views.ask()

    def _show(self) -> float | None:
        """Tell the views; whoever calls it, one after the other."""
        with self._showing:
            return self._show_alone()

    def _show_alone(self) -> float | None:
        writer, pause = self.writer, None
        with self._counting:
            state, runs = writer.state, self._runs
            ended = state == "idle" and self._told < runs
        if self.comm is None:
            self._tell(runs)
            return None
        with self.showing_errors():
            values = self._ending() if ended else {}
            values |= self._facts(state)
            # The text and the traits that show it change together: whoever asks for the state
            # meanwhile (a page that is opened, a cell) waits, and never sees a half of both.
            with self._updating:
                pause = self._show_text(values, ended=ended)
                self.update(state=state, **values)
            if state == "idle":
                self._estimate()
        if ended:
            self.update(state="idle", waiting={})  # also if showing the text has failed
            self._tell(runs)
        return pause

    def _facts(self, state: str) -> dict[str, Any]:
        """The traits that say how far a run is and how fast it was."""
        writer = self.writer
        values: dict[str, Any] = {}
        timing = writer.timing
        if timing is not None:
            values["stats"] = {
                "tokens": timing.tokens,
                "computed": timing.computed,
                "first": timing.to_first,
                "rate": timing.per_second,
                "shares": [[name, round(part, 4)] for name, part in timing.shares.items()],
                "lost": timing.lost,
            }
        total = len(writer.draft.prompt) + len(writer.draft.tokens)
        values["progress"] = [writer.read, total] if state == "reading" and writer.read else []
        return values

    def _tell(self, runs: int) -> None:
        """The views know how so many runs ended."""
        with self._counting:
            self._told = runs
            self._counting.notify_all()

    def _show_text(self, values: dict[str, Any], *, ended: bool) -> float | None:
        """Add to ``values`` what shows the text; may ask for a longer pause before the next.

        Called with `_updating` held, so that nobody sees the text and its traits differ.
        """
        raise NotImplementedError

    def _ending(self) -> dict[str, Any]:
        """What to say of a run that has ended."""
        writer = self.writer
        bill = ""
        if self._swarm is not None and self._before is not None and self._swarm.connected:
            used = self._swarm.bill() - self._before
            bill = used.line if used.requests else ""
        if writer.error is not None:
            error = f"{type(writer.error).__name__}: {writer.error}"
            self._estimated = ()  # what the next run takes may not be what this one was to take
            return {"note": "stopped by an error; the text is kept", "error": error, "bill": bill}
        return {"note": self._verdict(), "bill": bill}

    def _verdict(self) -> str:
        written = self.writer.timing.tokens if self.writer.timing is not None else 0
        if self.writer.finished:
            return "finished"
        if written >= self.max_new_tokens:
            return f"reached max_new_tokens ({written})"
        return "stopped"

    def _estimate_traits(self) -> list[str]:
        """Traits that the preview depends on."""
        return ["max_new_tokens"]

    def _prompt_ids(self) -> Sequence[int]:
        """The ids of what would be written after, with what the widget holds now."""
        raise NotImplementedError

    def _estimate(self) -> None:
        """Tell the views what a run will take, or nothing if that cannot be told."""
        if self._swarm is None or not self._swarm.connected:
            return self.update(preview="", obstacle="")
        inputs = (*(getattr(self, name) for name in self._estimate_traits()), self.bill)
        if inputs == self._estimated:
            return None
        count, preview, obstacle = len(self._prompt_ids()), "", ""
        try:
            if count and self.max_new_tokens >= 1:
                expected = self._swarm.preview(
                    prompt_tokens=count, max_new_tokens=self.max_new_tokens
                )
                preview = expected.line
            self._estimated = inputs
        except SwarmError as error:
            obstacle = str(error)
        return self.update(preview=preview, obstacle=obstacle)
