"""What every widget gets from its base class, in Python alone: no kernel, no browser."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import traitlets
from support.patience import PATIENCE, wait_until

from swarm_notebook import widgets
from swarm_notebook.widgets.parts import assets, heart
from swarm_notebook.widgets.parts.base import Widget, action
from swarm_notebook.widgets.parts.pulse import start_pulse

SVG = "http://www.w3.org/2000/svg"  # a name, which nobody fetches
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class Gauge(Widget, module="map"):
    level = traitlets.Float().tag(sync=True)
    unit = traitlets.Unicode("V").tag(sync=True)

    def summary(self) -> str:
        return "a gauge"

    def picture(self) -> str:
        return f"<b>{self.level}</b>"

    @action
    def reset(self, to: float) -> None:
        self.update(level=to)

    def secret(self) -> None:
        raise AssertionError("no action")


@pytest.fixture
def gauge() -> Gauge:
    return Gauge(level=2.0)


def sent_by(widget: Widget) -> list[dict[str, Any]]:
    """The states that it sends from now on."""
    sent: list[dict[str, Any]] = []
    widget._send = lambda message, buffers=None: sent.append(message["state"])
    return sent


def test_a_widget_says_that_python_is_there_and_that_its_swarm_is_not(
    gauge: Gauge, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(heart, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(gauge, "_send", lambda message, **_: said.append(message.get("content")))
    heart.keep_alive(gauge)
    wait_until(lambda: len(said) > 2)
    assert said[0] == {"alive": True}
    assert gauge.gone == ""
    gauge._swarm = SimpleNamespace(connected=False)  # type: ignore[attr-defined]
    gauge.beat()
    assert gauge.gone.startswith(
        "This notebook has disconnected from the swarm. To continue, connect again"
    )
    gauge.close()
    time.sleep(0.05)
    said.clear()
    time.sleep(0.05)
    assert said == []


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"Gauge\(\) has no argument colour, size"):
        Gauge(level=1.0, size=3, colour="red")


def test_a_widget_shows_itself_in_three_ways(gauge: Gauge) -> None:
    data, _ = gauge._repr_mimebundle_()
    assert data["text/plain"] == repr(gauge) == "<Gauge: a gauge>"
    assert data["text/html"] == "<b>2.0</b>"
    assert data[WIDGET_VIEW]["model_id"] == gauge.model_id
    gauge.close()
    data, _ = gauge._repr_mimebundle_()
    assert data == {"text/plain": "<Gauge: a gauge>", "text/html": "<b>2.0</b>"}


def test_many_traits_are_one_message(gauge: Gauge) -> None:
    sent = sent_by(gauge)
    gauge.update(level=3.0, unit="A")
    gauge.update(level=3.0, unit="A")
    assert sent == [{"level": 3.0, "unit": "A"}]


def test_threads_may_update_at_the_same_time(gauge: Gauge) -> None:
    sent = sent_by(gauge)

    def work(start: int) -> None:
        for step in range(200):
            gauge.update(level=float(start + step), unit=str(start + step))

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 800
    assert all(state["unit"] == str(int(state["level"])) for state in sent)


def test_actions_are_called_and_nothing_else_is(gauge: Gauge) -> None:
    def message(content: object) -> None:
        gauge._handle_custom_msg(content, [])

    message({"action": "reset", "with": {"to": 7.5}})
    assert gauge.level == 7.5
    assert not gauge.error
    for content in ({"action": "secret"}, {"action": "close"}, {"action": "level"}, {}, 5):
        message({"action": "dismiss"})
        message(content)
        assert "ValueError" in gauge.error
    message({"action": "reset", "with": {"from": 1}})
    assert "TypeError" in gauge.error
    message({"action": "dismiss"})
    assert not gauge.error


def test_a_pulse_ends_with_its_widget() -> None:
    class Beating(Gauge):
        def beat(self) -> bool:
            self.update(level=self.level + 1)
            if self.level == 50:
                raise RuntimeError("enough")
            return True

    def ended(thread: threading.Thread) -> bool:
        thread.join(PATIENCE)
        return not thread.is_alive()

    closed, failing, dropped = Beating(), Beating(level=40.0), Beating()
    threads = [start_pulse(one.beat, 0.01) for one in (closed, failing, dropped)]
    wait_until(lambda: closed.level >= 3)
    closed.close()
    assert ended(threads[0])
    assert ended(threads[1])
    assert failing.error == "RuntimeError: enough"
    # ipywidgets keeps every widget that is not closed; this stands for a kernel that lets go.
    dropped.comm = None
    del dropped
    gc.collect()
    assert ended(threads[2])


@pytest.mark.parametrize("name", widgets.__all__)
def test_scripts_are_whole_small_and_take_nothing_from_a_network(name: str, tmp_path: Path) -> None:
    script, style = getattr(widgets, name)._esm, getattr(widgets, name)._css
    assert len(script.encode()) < assets.MAX_BYTES
    assert not [line for line in script.splitlines() if line.startswith("import")]
    for text in (script.replace(SVG, ""), style):
        assert "http:" not in text
        assert "https:" not in text
    assert ".sn-widget" in style
    node = shutil.which("node")
    if node:
        path = tmp_path / "widget.mjs"
        path.write_text(script)
        subprocess.run([node, "--check", path], check=True, timeout=PATIENCE)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.js").write_text(text)


def test_shared_modules_are_taken_in_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "folder", lambda: tmp_path)
    write(
        tmp_path,
        a="export const one = 1;\nexport function two() {\n  return 2;\n}\n",
        b='import { one } from "./a.js";\nexport const three = 2 + one;\n',
        c='import {\n  one,\n  two,\n} from "./a.js";\nimport { three } from "./b.js";\n'
        "export default { sum: one + two() + three };\n",
    )
    script = assets.script.__wrapped__("c")
    assert script.count("const one = 1;") == 1
    assert script.index("const one") < script.index("const three") < script.index("sum: one")
    assert "import" not in script


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('import { one } from "./a.js";\nconst one = 2;\n', "define one twice"),
        ('import { one as eins } from "./a.js";\nimport x from "y";\n', "not of the form"),
        ("x" * 60_000, "60000 bytes"),
    ],
)
def test_what_would_break_a_script_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr(assets, "folder", lambda: tmp_path)
    write(tmp_path, a="export const one = 1;\n", w=text)
    with pytest.raises(ValueError, match=message):
        assets.script.__wrapped__("w")


def test_names_are_listed_and_imported_on_use() -> None:
    code = (
        "import sys, swarm_notebook.widgets as w\n"
        "assert set(w.__all__) <= set(dir(w))\n"
        "assert not {'anywidget', 'ipywidgets', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = widgets.Nothing
