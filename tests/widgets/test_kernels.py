"""The widgets on both generations of ipykernel, seen as a front end sees them: by messages.

`make` installs ipykernel 6 beside the environment's own 7, in ``ipykernel-6`` of the environment's
folder; on a kernel's path it goes first. What is asked for: a widget is live while a cell runs, an
action arrives while none does, and an interrupt of a cell that trains is a stop that saves.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from kernel import Kernel
from letters import add_tokenizer
from tiny import tiny_model

if TYPE_CHECKING:
    from scene import Scene

TIMEOUT = 40.0
OLD = Path(sys.prefix) / "ipykernel-6"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Fifty tokens a second: fast enough to wait for some, slow enough to be stopped in the middle.
SLOWED = "pace = model.register_forward_pre_hook(lambda *_: time.sleep(0.02))"
VIEW = "application/vnd.jupyter.widget-view+json"


class FrontEnd(Kernel):
    """A kernel, and the states of its widgets as a notebook would hold them."""

    def __init__(self, path: str = "") -> None:
        before = os.environ.get("PYTHONPATH", "")
        self.environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{before}"}
        self.states: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(kernel_name="python3", env=self.environment)
        return self

    def show(self, code: str) -> str:
        """Run a cell that displays a widget; returns its id."""
        message, shown = self.start(code), ""
        while True:
            found = self.receive()
            content = found["content"]
            assert found["msg_type"] != "error", content
            shown = content.get("data", {}).get(VIEW, {}).get("model_id", shown)
            if self.is_idle(found, message):
                return shown

    def receive(self) -> dict[str, Any]:
        """The next message of the kernel; takes note of states."""
        found = self.client.get_iopub_msg(timeout=TIMEOUT)
        content = found["content"]
        if found["msg_type"] in {"comm_open", "comm_msg"}:
            state = self.states.setdefault(content["comm_id"], {})
            state.update(content["data"].get("state", {}))
        return found

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline
            self.receive()

    def await_idle(self, message: str) -> None:
        while not self.is_idle(self.receive(), message):
            pass

    @staticmethod
    def is_idle(found: dict[str, Any], message: str) -> bool:
        idle = found["content"].get("execution_state") == "idle"
        return idle and found["parent_header"].get("msg_id") == message

    def tell(self, comm: str, data: dict[str, Any]) -> None:
        """What a browser sends for a widget."""
        content = {"comm_id": comm, "data": data}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))

    def act(self, comm: str, action: str, **arguments: Any) -> None:
        content = {"action": action, "with": arguments}
        self.tell(comm, {"method": "custom", "content": content})


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
    kernel.until(lambda: "is 2 tokens" in kernel.states[lens]["error"])


def test_a_text_grows_while_a_cell_runs_and_an_interrupt_of_waiting_stops_it(
    kernel: FrontEnd,
) -> None:
    kernel.run(SLOWED)
    shown = kernel.show(
        "writer = GenerateWidget(model, 'Hello', tokenizer=tokenizer, max_new_tokens=240); writer"
    )
    state = kernel.states[shown]

    def written() -> int:
        return len(state["cells"]) + len(state["tail"])

    kernel.act(shown, "run")
    kernel.until(lambda: written() > 2)
    before, cell = written(), kernel.start("time.sleep(0.5)")
    kernel.await_idle(cell)
    assert before < written() < 240
    kernel.act(shown, "stop")
    kernel.until(lambda: state["note"] == "stopped" and state["state"] == "idle")
    stopped = written()
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


def test_a_conversation_is_stopped_and_goes_on(kernel: FrontEnd) -> None:
    kernel.run(SLOWED)
    shown = kernel.show("chat = ChatWidget(model, tokenizer=tokenizer, max_new_tokens=200); chat")
    state = kernel.states[shown]
    kernel.act(shown, "send", text="Hi")
    kernel.until(lambda: bool(state["live"]))
    # Long enough for more than white space, even where a token takes a tenth of a second.
    cell = kernel.start("time.sleep(2)")
    early = state["live"]
    kernel.await_idle(cell)
    assert len(state["live"]) > len(early)
    kernel.act(shown, "stop")
    kernel.until(lambda: [turn["role"] for turn in state["turns"]] == ["user", "assistant"])
    assert state["note"] == "stopped"
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
    monitor = kernel.show(
        "saved = []\n"
        "monitor = TrainingMonitor(save=lambda: saved.append(1))\n"
        "def train():\n"
        "    for step in range(100_000):\n"
        "        monitor.log(loss=step)\n"
        "        time.sleep(0.01)\n"
        "monitor.run(train)"
    )
    state = kernel.states[monitor]
    kernel.until(lambda: len(state["points"]) > 2)
    kernel.act(monitor, "pause")
    kernel.until(lambda: state["state"] == "paused")
    assert kernel.value("monitor.state") == "'paused'"
    kernel.act(monitor, "stop")
    kernel.until(lambda: state["state"] == "stopped")
    assert kernel.value("monitor.wait(10), saved") == "(None, [1])"


def test_a_monitor_in_a_busy_cell_is_live_and_an_interrupt_saves(kernel: FrontEnd) -> None:
    state = kernel.states[kernel.value("monitor.model_id").strip("'")]
    cell = kernel.start("saved.clear()\nwith monitor:\n    train()")
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
    cell = kernel.start(
        "import threading, torch\n"
        "threading.Timer(1, lambda: swarm.model(torch.tensor([[3, 4, 5]]))).start()\n"
        "time.sleep(4)"
    )
    updates = 0
    while not kernel.is_idle(found := kernel.receive(), cell):
        updates += found["msg_type"] == "comm_msg" and found["content"]["comm_id"] == shown
    assert updates >= 1
    kernel.run("swarm.disconnect()")
