"""A `TrainingMonitor` as a callback of transformers' `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from swarm_notebook.widgets.training.run import TrainingRun

_NAMES = ("loss", "learning_rate", "grad_norm", "eval_loss")


class MonitorCallback(TrainerCallback):
    """Logs what the trainer logs; pauses and stops it after a step.

    Tokens are counted where they go in: by a hook on the model, which sees every batch.
    """

    def __init__(self, monitor: TrainingRun):
        self._monitor = monitor
        self._tokens = 0
        self._counter: Any = None
        self._owner = False  # whether the run began here, not by `with monitor` around it

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self._owner:  # the last run ended by an error, of which callbacks are not told
            self.on_train_end(args, state, control)
        self._owner = not self._monitor.under_way
        if self._owner:
            self._monitor.__enter__()
        self._monitor.update(total=int(state.max_steps))
        self._tokens = 0
        self._counter = given["model"].register_forward_pre_hook(self._count, with_kwargs=True)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        found = {name: float(logs[name]) for name in _NAMES if logs and name in logs}
        if found:
            self._monitor.note(state.global_step, found)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        tokens, self._tokens = self._tokens, 0
        if self._monitor.note(state.global_step, {}, tokens):
            control.should_training_stop = control.should_save = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._monitor.state == "stopping":
            self._monitor.saved(f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._counter.remove()
        if self._owner:
            self._owner = False
            self._monitor.__exit__(None, None, None)

    def _count(self, model: Any, _args: object, given: dict[str, Any]) -> None:
        ids = given.get("input_ids")
        if ids is not None and model.training:
            self._tokens += int(ids.numel())
