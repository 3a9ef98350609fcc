"""One text that grows in the background.

A run is one thread and one call of ``model.generate``; before it, what the model does not know yet
of a long prompt is read in pieces, so that progress shows and Stop works there too. `stop` lets the
token that is being computed come; asked twice, it gives that up as well (a remote model's servers
then forget their keys and values, and the next run computes them again).

State changes happen under one lock, and only the run's own thread writes tokens. ``on_change`` is
called from both threads after each change, without the lock; it must return quickly.
"""

from __future__ import annotations

import atexit
import inspect
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any, Literal

import torch

from swarm_notebook.client.loop import cancel_wait
from swarm_notebook.errors import Busy
from swarm_notebook.progress import cell_thread
from swarm_notebook.writing.draft import Draft, Token
from swarm_notebook.writing.keys import KeysAndValues
from swarm_notebook.writing.sampling import OwnRandomness, Sampling
from swarm_notebook.writing.timing import Timing

ALTERNATIVES = 5
READ_AT_ONCE = 256  # tokens of a prompt per step: about a second on a slow server
_END_SECONDS = 5.0

State = Literal["idle", "reading", "writing", "stopping"]


class Writer:
    """Writes one text with a model.

    Args:
        model: a causal LM of transformers, remote or local, plain or wrapped by PEFT.
        on_change: called after every change, from any thread.
        alternatives: how many of the most probable tokens to note at each place.

    Attributes:
        draft: the text. Read it at any time; it grows while a run goes on, and a new text or a
            branch is another draft.
        state: ``idle``, ``reading`` the prompt, ``writing``, or ``stopping``.
        read: tokens of the prompt that the model has read, while ``reading``.
        error: what ended the last run, if it did not end as it should. The text is kept.
        timing: of the last run, or None.
        finished: the model itself ended the last run, with a token that says so.
    """

    def __init__(
        self,
        model: Any,
        on_change: Callable[[], None] | None = None,
        *,
        alternatives: int = ALTERNATIVES,
    ):
        self.model = model
        self.draft: Draft = Draft()
        self.state: State = "idle"
        self.read: int = 0
        self.error: Exception | None = None
        self.timing: Timing | None = None
        self.finished: bool = False
        self._on_change = on_change or (lambda: None)
        self._alternatives = alternatives
        self._keys = KeysAndValues(model)
        self._random: OwnRandomness | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        _writers.add(self)

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self.state != "idle"

    def write(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Begin a new text; what its prompt shares with the text before is not computed again.

        Raises:
            Busy: a run is going on.
            ValueError: the prompt is empty.
        """
        if not prompt:
            raise ValueError("The prompt is empty.")
        self._begin(lambda: setattr(self, "draft", Draft(list(prompt))), sampling, anew=True)

    def resume(self, sampling: Sampling) -> None:
        """Go on where the text ends, as if it had never stopped.

        Raises:
            Busy: a run is going on.
            ValueError: there is no text yet.
        """
        if not self.draft.prompt:
            raise ValueError("there is no text yet to continue")
        self._begin(lambda: None, sampling, anew=False)

    def branch(self, position: int, ids: Sequence[int], sampling: Sampling) -> None:
        """Put other tokens in a place, in another text, and go on there; this one stays.

        Raises:
            Busy: a run is going on.
            IndexError: there is no such place.
        """
        self._begin(lambda: self._replace(position, ids), sampling, anew=True)

    def edit(self, position: int, ids: Sequence[int]) -> None:
        """As `branch`, but write nothing yet.

        Raises:
            Busy: a run is going on.
            IndexError: there is no such place.
        """
        with self._lock:
            self._refuse_if_running()
            self._replace(position, ids)
        self._on_change()

    def open(self, draft: Draft) -> None:
        """Turn to another text of this model, such as one that was written before.

        Raises:
            Busy: a run is going on.
        """
        with self._lock:
            self._refuse_if_running()
            self.draft = draft
        self._on_change()

    def forget(self) -> None:
        """Drop what the model has computed, as when it is no longer the same model.

        Raises:
            Busy: a run is going on.
        """
        with self._lock:
            self._refuse_if_running()
            self._keys.forget()

    def stop(self) -> None:
        """End the run after the present token; asked again, without waiting for that token."""
        with self._lock:
            thread = self._thread
            if self.state == "idle" or thread is None:
                return
            again, self.state = self._stop.is_set(), "stopping"
            self._stop.set()
        if again and thread.ident is not None:
            cancel_wait(thread.ident)
        self._on_change()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the run to end; whether it has. An interrupt stops the run."""
        thread = self._thread
        if thread is None:
            return True
        try:
            thread.join(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise
        return not thread.is_alive()

    def close(self) -> None:
        """Stop, and free the memory of the keys and values when the run has ended."""
        self.stop()
        self.stop()
        if self.wait(_END_SECONDS):
            self._keys.forget()

    def _refuse_if_running(self) -> None:
        if self.state != "idle":
            raise Busy("this text is still being written; stop it first, or wait for it to end")

    def _replace(self, position: int, ids: Sequence[int]) -> None:
        self.draft = self.draft.branch(position, ids)

    def _begin(self, change: Callable[[], object], sampling: Sampling, *, anew: bool) -> None:
        with self._lock:
            self._refuse_if_running()
            change()
            if anew or self._random is None:
                self._random = OwnRandomness(sampling.seed, self.model.device)
            self._stop.clear()
            self.state, self.error, self.read, self.finished = "reading", None, 0, False
            self.timing = Timing(time.monotonic())
            self._thread = cell_thread("writer", self._run, sampling)
            self._thread.start()
        self._on_change()

    def _run(self, sampling: Sampling) -> None:
        try:
            self._generate(sampling, self.draft.ids)
        except CancelledError:
            self._keys.broken()  # asked for: a second stop does not wait for the token
        except Exception as error:  # whatever it is, it is shown
            self._keys.broken()
            self.error = error
        finally:
            self._keys.settle(self.draft.ids)
            with self._lock:
                self.state = "idle"
            self._on_change()

    def _generate(self, sampling: Sampling, ids: list[int]) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        from swarm_notebook.writing.taps import Chosen, Predictions, StopWhen

        timing = self.timing
        if timing is None or self._random is None:
            raise RuntimeError("a run needs its clock and its randomness")
        lost = self._keys.lost()
        timing.computed = len(ids) - self._keys.known(ids)
        cache = self._keys.prepare(ids, sampling.max_new_tokens)
        if cache is not None and not self._read(ids, cache, timing):
            return
        predictions = Predictions(self._alternatives)

        def chosen(token: int) -> None:
            timing.passed(self._keys.latest())
            timing.token(time.monotonic())
            timing.lost = self._keys.lost() - lost
            self._take(replace(predictions.take(token), servers=self._keys.servers()))
            self._on_change()

        inputs = torch.tensor([ids], device=self.model.device)
        with self._random:
            self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=cache,
                logits_processor=LogitsProcessorList([predictions]),
                stopping_criteria=StoppingCriteriaList([StopWhen(self._stop.is_set)]),
                streamer=Chosen(chosen),
                **sampling.arguments(),
            )
        self.finished = not self._stop.is_set() and timing.tokens < sampling.max_new_tokens

    def _take(self, token: Token) -> None:
        self.draft.tokens.append(token)
        with self._lock:
            if self.state == "reading":
                self.state = "writing"

    def _read(self, ids: list[int], cache: Any, timing: Timing) -> bool:
        """Let the model read all but the last piece of the prompt; False if stopped."""
        forward = getattr(self.model, "get_base_model", lambda: self.model)().forward
        options: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
        if "logits_to_keep" in inspect.signature(forward).parameters:
            options["logits_to_keep"] = 1
        position = cache.get_seq_length()
        while len(ids) - position > READ_AT_ONCE:
            if self._stop.is_set():
                return False
            piece = torch.tensor([ids[position : position + READ_AT_ONCE]])
            with torch.no_grad():
                self.model(input_ids=piece.to(self.model.device), **options)
            timing.passed(self._keys.latest())
            position += READ_AT_ONCE
            self.read = position
            self._on_change()
        return not self._stop.is_set()


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that still runs torch's code when the interpreter goes down would crash it."""
    for writer in list(_writers):
        writer.stop()
        writer.stop()
    for writer in list(_writers):
        writer.wait(_END_SECONDS)
