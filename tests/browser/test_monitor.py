"""The training monitor, while a LoRA adapter of the swarm's model is trained in the background."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from browser.notebook import Notebook
from playwright.sync_api import Locator, expect

TRAINING = """
import torch
TOTAL = 4000  # nobody waits for its end
from peft import LoraConfig, get_peft_model
from swarm_notebook.widgets import TrainingMonitor

torch.manual_seed(0)
lora = get_peft_model(swarm.model, LoraConfig(target_modules=["q_proj"], r=2))
optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
batch = tokenizer("The capital of France is Paris.", return_tensors="pt")
saved = []
def save():
    saved.append(monitor.step)
    return "my-adapter"

monitor = TrainingMonitor(swarm, total=TOTAL, save=save)

def train():
    for _ in range(TOTAL):
        loss = lora(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate = optimizer.param_groups[0]["lr"]
        monitor.log(
            loss=loss, learning_rate=rate, grad_norm=norm, tokens=batch["input_ids"].numel()
        )
"""


@pytest.fixture(scope="module")
def monitor(notebook: Notebook) -> Locator:
    notebook.run(TRAINING)
    return notebook.run("monitor.run(train)").get_by_test_id("monitor")


def test_buttons_steer_a_run_and_the_kernel_stays_usable(
    notebook: Notebook, monitor: Locator
) -> None:
    expect(monitor.get_by_test_id("state")).to_have_text("running")
    expect(monitor.get_by_test_id("curve-loss")).to_be_visible()
    monitor.get_by_role("button", name="Pause").click()
    expect(monitor.get_by_test_id("state")).to_have_text("paused")
    # The step that was under way comes to its end, however slow the machine is; no other begins.
    notebook.run("import time; before = len(monitor.history)")
    assert notebook.value("time.sleep(2.5); len(monitor.history) - before") in {"0", "1"}
    monitor.get_by_role("button", name="Resume").click()
    expect(monitor.get_by_test_id("state")).to_have_text("running")
    assert notebook.value("6 * 7") == "42"


def test_a_curve_is_read_by_keyboard(monitor: Locator) -> None:
    plot = monitor.get_by_role("img", name="loss")
    plot.focus()
    plot.press("Home")
    expect(monitor.get_by_test_id("curve-loss")).to_contain_text("at step 1")


def test_pictures(monitor: Locator, picture: Callable[[Locator, str], None]) -> None:
    expect(monitor.get_by_test_id("facts")).to_contain_text("tokens/s")
    monitor.get_by_test_id("smoothing").fill("0.8")
    expect(monitor.get_by_test_id("curve-loss")).to_contain_text("mean")
    picture(monitor, "monitor")


def test_stop_saves(notebook: Notebook, monitor: Locator) -> None:
    monitor.get_by_role("button", name="Stop and save").click()
    expect(monitor.get_by_test_id("state")).to_have_text("stopped")
    expect(monitor.get_by_role("button")).to_have_count(0)
    expect(monitor.get_by_test_id("outcome")).to_have_text("saved to my-adapter")
    assert notebook.value("monitor.wait(), saved == [monitor.step], monitor.step < TOTAL") == (
        "(None, True, True)"
    )
