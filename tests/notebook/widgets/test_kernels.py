"""The widgets on both generations of ipykernel, seen as a front end sees them: by messages.

`make` installs ipykernel 6 beside the environment's own 7, in ``ipykernel-6`` of the environment's
folder; on a kernel's path it goes first. What is asked for: a widget is live while a cell runs, an
action arrives while none does, and an interrupt of a cell that trains is a stop that saves.
"""

from __future__ import annotations

import json
import sys
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from support.front_end import FrontEnd, shown_cells
from support.letter_tokenizer import add_tokenizer
from support.tiny import tiny_model

if TYPE_CHECKING:
    from support.scene import Scene

OLD = Path(sys.prefix) / "ipykernel-6"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Ten tokens a second: fast enough to wait for some, slow enough to be stopped in the middle.
SLOWED = "pace = model.register_forward_pre_hook(lambda *_: time.sleep(0.1))"
# What takes a model minutes. The views are told of every fourth token.
GROW = """
from swarm_notebook.writing import Token
def grow(count):
    for number in range(count):
        long.writer._take(Token(40 + number % 60, 0.5, ((40, 0.5), (41, 0.25))))
        if number % 20 == 19:  # a kernel's socket loses what comes after a thousand unread messages
            long._show()
"""


MONITOR = """
saved = []
monitor = TrainingMonitor(save=lambda: saved.append(1))
def train():
    for step in range(100_000):
        monitor.log(loss=step)
        time.sleep(0.01)
"""


@pytest.fixture(scope="module", params=["6", "7"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[FrontEnd]:
    """With a local model: what is tested is the way between widgets and front ends."""
    folder = add_tokenizer(tiny_model("llama", tmp_path_factory.mktemp("models")))
    assert OLD.is_dir(), "ipykernel 6 is missing; remove .venv/.ready and run make"
    with FrontEnd(str(OLD) if request.param == "6" else "") as opened:
        major = opened.value("__import__('ipykernel').version_info[0]")
        assert major == request.param
        opened.run(
            "import time, torch, swarm_notebook as sn\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "from swarm_notebook.widgets import (\n"
            "    ChatWidget, GenerateWidget, LensWidget, ServePanel, SwarmMap, TrainingMonitor\n"
            ")\n"
            f"folder = {str(folder)!r}\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "model.generation_config.eos_token_id = None  # it writes on and on\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            f"tokenizer.chat_template = {TEMPLATE!r}"
        )
        yield opened


def test_a_lens_takes_a_selection_and_ranks_a_token(kernel: FrontEnd) -> None:
    lens = kernel.show("lens = LensWidget(model, 'Hello', tokenizer=tokenizer); lens")
    assert kernel.states[lens]["words"] == list("Hello")
    kernel.tell(lens, {"method": "update", "state": {"selected": [2, 1]}, "buffer_paths": []})
    assert kernel.value("tuple(lens.hidden_state.shape)") == "(48,)"
    kernel.act(lens, "rank", token="o")
    kernel.until(lambda: kernel.states[lens]["token"] == "o")
    kernel.act(lens, "rank", token="no")
    kernel.until(lambda: "needs a single token; 'no' is 2" in kernel.states[lens]["error"])


@contextmanager
def busy(kernel: FrontEnd, before: str = "") -> Iterator[None]:
    """A cell runs as long as the context."""
    with TemporaryDirectory() as folder:
        done = Path(folder) / "done"
        cell = kernel.start(
            f"{before}\ndone = __import__('pathlib').Path({str(done)!r})\n"
            "while not done.exists(): time.sleep(0.02)"
        )
        kernel.until(lambda: kernel.running == cell)
        yield
        assert kernel.running == cell
        done.touch()
        kernel.await_idle(cell)


def grow_and_stop(kernel: FrontEnd, shown: str, size: Callable[[], int]) -> None:
    """What is being written grows while a cell runs, and ends when Stop is clicked."""
    kernel.until(lambda: size() > 2)
    with busy(kernel):
        before = size()
        kernel.until(lambda: size() > before)
    kernel.act(shown, "stop")
    state = kernel.states[shown]
    kernel.until(lambda: state["note"] == "stopped" and state["state"] == "idle")


def test_a_text_grows_while_a_cell_runs_and_an_interrupt_of_waiting_stops_it(
    kernel: FrontEnd,
) -> None:
    kernel.run(SLOWED)
    shown = kernel.show(
        "writer = GenerateWidget(model, 'Hello', tokenizer=tokenizer, max_new_tokens=240); writer"
    )
    state = kernel.states[shown]

    def written() -> int:
        return len(shown_cells(state))

    kernel.act(shown, "run")
    grow_and_stop(kernel, shown, written)
    stopped = written()
    assert stopped < 240
    assert kernel.value("len(writer.tokens)") == str(stopped)
    kernel.act(shown, "resume")
    kernel.until(lambda: written() > stopped)
    cell = kernel.start("writer.wait()")
    kernel.until(lambda: written() > stopped + 5)
    kernel.manager.interrupt_kernel()
    kernel.until(lambda: state["state"] == "idle")
    kernel.await_idle(cell)
    assert state["note"] == "stopped"
    assert written() < 240
    kernel.act(shown, "branch", position=999, token="x")
    kernel.until(lambda: "IndexError" in state["error"])
    kernel.run("pace.remove(); writer.close()")


def test_a_long_text_is_sent_once_and_is_whole_for_whoever_comes_later(kernel: FrontEnd) -> None:
    shown = kernel.show("long = GenerateWidget(model, 'Hello', tokenizer=tokenizer); long")
    kernel.run(GROW)

    def text(state: dict[str, Any]) -> str:
        return "".join(cell[0] for cell in shown_cells(state) if not cell[2])

    def sent_by(code: str) -> int:
        before = kernel.bytes[shown]
        kernel.await_idle(kernel.start(code))
        written = literal_eval(kernel.value("long.text"))
        assert text(kernel.states[shown]) == text(kernel.reload()[shown]) == written
        return kernel.bytes[shown] - before

    early, late = sent_by("grow(5_000)"), sent_by("grow(5_000)")
    assert late < 1.05 * early
    # What was cut off is gone for all: no saved notebook has it.
    sent_by("long.edit(1_000, ' '); long._show()")
    kept = json.dumps(kernel.states[shown])
    assert len(kept) < (early + late) / 5
    kernel.run("long.close()")


def test_a_conversation_is_stopped_and_goes_on(kernel: FrontEnd) -> None:
    kernel.run(SLOWED)
    shown = kernel.show("chat = ChatWidget(model, tokenizer=tokenizer, max_new_tokens=200); chat")
    state = kernel.states[shown]
    kernel.act(shown, "send", text="Hi")
    grow_and_stop(kernel, shown, lambda: len(state["live"]))
    assert [turn["role"] for turn in state["turns"]] == ["user", "assistant"]
    assert kernel.value("chat.messages[1]['content']") == repr(state["turns"][1]["text"])
    kernel.run("pace.remove()")
    kernel.tell(shown, {"method": "update", "state": {"max_new_tokens": 3}, "buffer_paths": []})
    kernel.act(shown, "edit", turn=0, text="Ho")
    kernel.until(lambda: state["note"] == "reached max_new_tokens (3)")
    assert kernel.value("chat.messages[0]['content'], len(chat.messages)") == "('Ho', 2)"
    kernel.run("chat.close()")


def test_a_server_is_lent_and_taken_back_by_buttons(kernel: FrontEnd) -> None:
    shown = kernel.show(
        "panel = ServePanel(folder, blocks=(1, 4), threads=1, listen='/ip4/127.0.0.1/tcp/0')\npanel"
    )
    state = kernel.states[shown]
    kernel.act(shown, "begin")
    # The server starts beside the kernel, and the panel follows while a cell runs.
    cell = kernel.start("while panel.state != 'serving': time.sleep(0.05)")
    kernel.until(lambda: state["state"] == "serving")
    kernel.await_idle(cell)
    kernel.until(lambda: state["facts"].get("cache_tokens_total", 0) > 0)
    kernel.act(shown, "stop")
    kernel.until(lambda: state["state"] == "stopped")
    assert kernel.value("panel.lending.pid, panel.error") == "(None, '')"
    kernel.run("panel.close()")


def test_a_monitor_in_the_background_obeys_its_buttons(kernel: FrontEnd) -> None:
    monitor = kernel.show(MONITOR + "monitor.run(train)")
    state = kernel.states[monitor]
    kernel.until(lambda: len(state["points"]) > 2)
    kernel.act(monitor, "pause")
    kernel.until(lambda: state["state"] == "paused")
    assert kernel.value("monitor.state") == "'paused'"
    kernel.act(monitor, "stop")
    kernel.until(lambda: state["state"] == "stopped")
    assert kernel.value("monitor.wait(), saved") == "(None, [1])"


def test_a_monitor_in_a_busy_cell_is_live_and_an_interrupt_saves(kernel: FrontEnd) -> None:
    state = kernel.states[kernel.show(MONITOR + "monitor")]
    cell = kernel.start("with monitor:\n    train()")
    kernel.until(lambda: state["state"] == "running" and state["step"] > 20)
    kernel.manager.interrupt_kernel()
    kernel.until(lambda: state["state"] == "stopped")
    kernel.await_idle(cell)
    assert kernel.value("saved") == "[1]"


def test_a_map_is_live_while_a_cell_runs(kernel: FrontEnd, tiny_scene: Scene) -> None:
    kernel.run(
        f"swarm = sn.connect({tiny_scene.local.initial_peers!r}, "
        f"model={str(tiny_scene.local.model)!r})"
    )
    shown = kernel.show("SwarmMap(swarm)")
    assert len(kernel.states[shown]["servers"]) == 2
    # Tokens pass while the main thread is busy with something else.
    later = "threading.Timer(1, lambda: swarm.model(torch.tensor([[3, 4, 5]]))).start()"
    with busy(kernel, before=f"import threading, torch\n{later}"):
        before = kernel.bytes[shown]
        kernel.until(lambda: kernel.bytes[shown] > before)
    kernel.run("swarm.disconnect()")
