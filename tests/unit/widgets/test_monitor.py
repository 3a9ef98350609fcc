"""The training monitor around hand-written loops and transformers' Trainer, without a browser."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.patience import PATIENCE, wait_until

from swarm_notebook.widgets import TrainingMonitor
from swarm_notebook.widgets.training.curves import MAX_POINTS, Curves


def act(monitor: TrainingMonitor, action: str) -> None:
    """As the script does it."""
    monitor._handle_custom_msg({"action": action, "with": {}}, [])
    assert not monitor.error


def test_a_loop_is_followed() -> None:
    monitor = TrainingMonitor(total=3)
    with monitor:
        assert monitor.state == "running"
        for step in range(3):
            monitor.log(loss=torch.tensor(3.0 - step), learning_rate=1e-3, tokens=10)
    assert (monitor.state, monitor.step, monitor.tokens) == ("finished", 3, 30)
    assert monitor.names == ["loss", "learning_rate"]
    assert monitor.points == [[1, 3.0, 1e-3], [2, 2.0, 1e-3], [3, 1.0, 1e-3]]
    assert monitor.history[2] == {"step": 3, "loss": 1.0, "learning_rate": 1e-3, "tokens": 10}
    assert monitor.speed > 0
    assert "finished at step 3 of 3" in monitor.picture()
    before = monitor.points
    with monitor:  # another run begins anew, over the curves of this one
        monitor.log(loss=5.0)
    assert monitor.points == [[1, 5.0]]
    assert [(run["name"], run["points"]) for run in monitor.runs] == [("run 1", before)]
    assert monitor.run_name == "run 2"


def test_a_loss_with_a_gradient_is_logged_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    with TrainingMonitor() as monitor:
        monitor.log(loss=torch.ones((), requires_grad=True) * 2)
    assert monitor.history == [{"step": 1, "loss": 2.0}]
    assert not recwarn.list


def test_wrong_use_is_said() -> None:
    monitor = TrainingMonitor()
    with pytest.raises(RuntimeError, match="inside `with monitor:`"):
        monitor.log(loss=1.0)
    with monitor, pytest.raises(TypeError, match="grad_norm: Tensor is not one number"):
        monitor.log(grad_norm=torch.zeros(2))
    with pytest.raises(TypeError, match="no argument colour"):
        TrainingMonitor(colour="red")


def test_a_value_that_is_no_number_is_an_alarm_and_a_gap() -> None:
    monitor = TrainingMonitor()
    with monitor:
        for loss in (1.0, math.nan, math.inf, 2.0):
            monitor.log(loss=loss)
    assert monitor.alarm == "loss is nan since step 2"
    assert monitor.points == [[1, 1.0], [2, None], [3, None], [4, 2.0]]


def test_pause_resume_and_stop_and_save() -> None:
    saved: list[int] = []
    monitor = TrainingMonitor(save=lambda: saved.append(len(monitor.history)))
    go = threading.Semaphore(0)

    def train() -> None:
        for step in range(100):
            go.acquire()
            monitor.log(loss=step)
        raise AssertionError("it was not stopped")

    monitor.run(train)
    with pytest.raises(RuntimeError, match="follows a run already"):
        monitor.run(train)
    go.release(2)
    wait_until(lambda: monitor.step == 2)
    act(monitor, "pause")
    go.release(2)
    wait_until(lambda: len(monitor.history) == 3)
    time.sleep(0.1)
    assert (len(monitor.history), monitor.state) == (3, "paused")  # it waits inside `log`
    act(monitor, "resume")
    wait_until(lambda: len(monitor.history) == 4)
    act(monitor, "stop")
    go.release()
    assert monitor.wait(PATIENCE) is None
    assert (monitor.state, saved, monitor.step) == ("stopped", [5], 5)
    assert monitor.outcome == "saved"
    act(monitor, "resume")
    assert monitor.state == "stopped"


def test_stopping_a_paused_run_ends_it() -> None:
    monitor = TrainingMonitor()
    monitor.run(lambda: [monitor.log(loss=step) or time.sleep(0.01) for step in range(10_000)])
    wait_until(lambda: len(monitor.history) > 2)
    act(monitor, "pause")
    act(monitor, "stop")
    monitor.wait(PATIENCE)
    assert monitor.state == "stopped"
    assert monitor.outcome.startswith("not saved")


def test_an_interrupt_saves_and_goes_on() -> None:
    saved: list[int] = []
    monitor = TrainingMonitor(save=lambda: saved.append(1) or "my-adapter")

    def interrupted() -> None:
        with monitor, monitor:
            monitor.log(loss=1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (monitor.state, saved) == ("stopped", [1])
    assert monitor.outcome == "saved to my-adapter"


def test_failures_are_shown_and_raised() -> None:
    def fail() -> None:
        raise OSError("disk full")

    monitor = TrainingMonitor()
    monitor.run(fail)
    with pytest.raises(OSError, match="disk full"):
        monitor.wait(PATIENCE)
    assert (monitor.state, monitor.error) == ("failed", "OSError: disk full")

    def stopped() -> None:
        with monitor:
            monitor.stop()
            monitor.log(loss=1.0)

    monitor = TrainingMonitor(save=fail)
    with pytest.raises(OSError, match="disk full"):
        stopped()
    assert (monitor.state, monitor.error) == ("failed", "OSError: disk full")
    assert not [thread for thread in threading.enumerate() if thread.name == "training-monitor"]


def test_curves_stay_small_and_keep_their_mean() -> None:
    curves = Curves()
    for step in range(1, 10_001):
        curves.add(step, {"loss": step})
        curves.add(step, {"norm": 2.0} if step % 2 else {})
    names, points = curves.shown()
    assert names == ["loss", "norm"]
    assert MAX_POINTS / 2 <= len(points) <= MAX_POINTS
    assert points[-1][0] == 10_000
    assert points[0] == [32, 16.5, 2.0]
    assert all(one[0] < two[0] for one, two in itertools.pairwise(points))


@pytest.fixture
def trainer(lettered: Any, tmp_path: Path) -> Callable[..., Any]:
    """A Trainer for a LoRA adapter of the tiny model: 8 steps of 2 x 6 tokens."""
    from copy import deepcopy

    from transformers import Trainer, TrainingArguments

    def make(*callbacks: Any) -> Any:
        model = get_peft_model(deepcopy(lettered.model), LoraConfig(target_modules=["q_proj"]))
        data = [{"input_ids": [40 + n, 41, 42, 43, 44, 45], "labels": [1] * 6} for n in range(16)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))

    return make


def test_a_trainer_is_followed_even_after_it_has_failed(
    trainer: Callable[..., Any], tmp_path: Path
) -> None:
    monitor = TrainingMonitor()
    callback = monitor.callback()
    ready = trainer(callback)
    dataset, ready.train_dataset = ready.train_dataset, [{"input_ids": [1]}, {}]
    with pytest.raises(KeyError, match="input_ids"):
        ready.train()
    ready.train_dataset = dataset
    ready.train()
    assert (monitor.state, monitor.step, monitor.total) == ("finished", 8, 8)
    assert monitor.tokens == 8 * 12
    assert monitor.names == ["loss", "learning_rate", "grad_norm"]
    assert [row["step"] for row in monitor.history] == list(range(1, 9))
    assert all(row["loss"] > 0 and row["tokens"] == 12 for row in monitor.history)
    assert not ready.model._forward_pre_hooks
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_trainer_is_stopped_and_saves(trainer: Callable[..., Any], tmp_path: Path) -> None:
    monitor = TrainingMonitor()
    callback = monitor.callback()
    ready = trainer(callback)
    callback.on_step_begin = lambda args, state, control, **_: (
        act(monitor, "stop") if state.global_step == 3 else None
    )
    monitor.run(ready.train)
    monitor.wait(PATIENCE)
    assert (monitor.state, monitor.step, ready.state.global_step) == ("stopped", 4, 4)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert monitor.outcome == f"saved to {tmp_path}/checkpoint-4"
