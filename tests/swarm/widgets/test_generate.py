"""The Generate widget: what a browser is sent, what its buttons do; hostile text is text."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.front_end import shown_cells
from support.hosting import HostedSwarm
from support.patience import PATIENCE
from support.widgets import act, tokens_sent, until

import swarm_notebook as sn
from swarm_notebook.errors import Busy
from swarm_notebook.probing.steering import SteeringVector
from swarm_notebook.widgets import GenerateWidget
from swarm_notebook.widgets.parts.throttle import Throttle
from swarm_notebook.widgets.parts.token_cells import PAGE, Cells
from swarm_notebook.writing import Draft, Token, Vocabulary

QUESTION = "What is the capital of Germany?"
ANSWER = "The capital of Germany is Berlin."


@pytest.fixture
def make(lettered: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GenerateWidget]]:
    """Widgets of the local tiny model, which writes on and on; closed in the end."""
    monkeypatch.setattr(lettered.model.generation_config, "eos_token_id", None)
    made: list[GenerateWidget] = []

    def make(prompt: str = "Hello", **options: Any) -> GenerateWidget:
        options = {"tokenizer": lettered.tokenizer, "max_new_tokens": 12, **options}
        made.append(GenerateWidget(lettered.model, prompt, **options))
        return made[-1]

    yield make
    for widget in made:
        widget.close()


def test_an_answer_of_the_swarm(demo: sn.Swarm) -> None:
    widget = GenerateWidget(demo, QUESTION, chat=True, max_new_tokens=30)
    try:
        until(lambda: "requests to 2 servers" in widget.preview)
        act(widget, "run")
        assert widget.wait(PATIENCE)
        assert widget.text == ANSWER
        assert (widget.state, widget.note, widget.error) == ("idle", "finished", "")
        assert "".join(cell[0] for cell in widget.cells if not cell[2]) == ANSWER
        assert widget.cells[-1][2]  # the end mark, which is no text
        assert [name for name, _ in widget.stats["shares"]] == ["local-0", "local-1"]
        assert widget.stats["tokens"] == len(widget.tokens)
        assert widget.stats["rate"] > 0
        assert "2 servers" in widget.bill
        assert ANSWER not in widget.picture()  # each token is a cell of its own
        assert "Berlin</span>" in widget.picture()
        assert repr(widget).endswith(f"{len(widget.tokens)} tokens written>")
    finally:
        widget.close()


def test_a_missing_server_is_told_while_it_is_waited_for(demo_swarm: HostedSwarm) -> None:
    with sn.connect(demo_swarm.initial_peers, model=demo_swarm.model, timeout=2) as swarm:
        widget = GenerateWidget(swarm, QUESTION, max_new_tokens=3)
        seen: list[dict[str, Any]] = []
        widget.observe(lambda change: seen.append(change["new"]), "waiting")
        try:
            swarm.connection.directory.min_bits = 99  # now no server will do
            widget.run()
            assert widget.wait(PATIENCE)
            assert seen[0]["text"].startswith("No server holds blocks 0:30 (local-0, local-1 had")
            assert seen[0]["limit"] == 2
            assert widget.waiting == {}
            assert widget.error.startswith("MissingBlocks: ")
            assert widget.preview == ""
            assert "no server holds blocks 0:30" in widget.obstacle
            swarm.connection.directory.min_bits = 0
            widget.run()
            assert widget.wait(PATIENCE)
            assert widget.tokens
            assert widget.obstacle == ""
        finally:
            widget.close()


def test_what_nobody_holds_ends(demo_swarm: HostedSwarm) -> None:
    ended = threading.Event()
    swarm = sn.connect(demo_swarm.initial_peers, model=demo_swarm.model)
    swarm.connection.end_with_me(ended.set)
    held: Any = swarm.model
    del swarm
    gc.collect()
    assert not ended.wait(0.1)  # its model is still held
    del held
    gc.collect()
    assert ended.wait(PATIENCE)


def test_a_branch_goes_on_from_there_and_sends_only_what_is_new(
    demo: sn.Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget = GenerateWidget(demo, QUESTION, chat=True, max_new_tokens=12)
    try:
        widget.run()
        assert widget.wait(PATIENCE)
        written, position = widget.writer.draft.written, 2
        token = next(one for one, *_ in widget.cells[position][3] if one != written[position])
        sent = tokens_sent(monkeypatch)
        act(widget, "branch", position=position, token=token)
        assert widget.wait(PATIENCE)
        assert not widget.error
        assert set(sent) == {1}
        draft = widget.writer.draft
        assert draft.written[: position + 1] == [*written[:position], token]
        ids = torch.tensor([draft.prompt + draft.written[: position + 1]])
        fresh = demo.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert draft.ids == fresh[0].tolist()
    finally:
        widget.close()


def test_the_cell_returns_at_once_and_stop_ends_within_a_token(make: Any) -> None:
    widget = make(max_new_tokens=200)
    widget.run()
    with pytest.raises(Busy):
        widget.run()
    until(lambda: len(widget.cells) >= 5)
    assert widget.state == "writing"
    seen = len(widget.writer.draft.tokens)
    act(widget, "stop")
    assert widget.wait(PATIENCE)
    assert len(widget.tokens) - seen <= 3  # some may have come between the two lines above
    assert widget.note == "stopped"
    before, count = widget.text, len(widget.tokens)
    act(widget, "resume")
    until(lambda: len(widget.tokens) > count)
    widget.stop()
    assert widget.wait(PATIENCE)
    assert widget.text.startswith(before)


def test_two_views_and_a_reload_see_one_state(make: Any) -> None:
    widget = make()
    widget.run()
    assert widget.wait(PATIENCE)
    state = json.loads(json.dumps(widget.get_state()))
    assert "".join(cell[0] for cell in shown_cells(state)) == widget.text
    assert state["note"] == "reached max_new_tokens (12)"


def test_the_controls_are_those_of_transformers(make: Any, lettered: Any) -> None:
    with pytest.raises(TypeError, match="no argument beams"):
        make(beams=3)
    with pytest.raises(ValueError, match="tokenizer"):
        GenerateWidget(lettered.model)
    widget = make(do_sample=True, temperature=1.7, seed=3)
    widget.run()
    assert widget.wait(PATIENCE)
    torch.manual_seed(3)
    inputs = lettered.tokenizer("Hello", return_tensors="pt")
    expected = lettered.model.generate(**inputs, do_sample=True, temperature=1.7, max_new_tokens=12)
    assert widget.writer.draft.ids == expected[0].tolist()
    widget.set_state({"temperature": -1})
    act(widget, "run")
    assert widget.error.startswith("ValueError: temperature must be 0 (greedy)")
    act(widget, "dismiss")
    widget.set_state({"temperature": 1, "prompt": ""})
    act(widget, "run")
    assert "The prompt is empty." in widget.error


@pytest.mark.parametrize(("position", "token"), [(99, 5), (0, 10**6), (0, "")])
def test_an_impossible_branch_is_told_and_harms_nothing(
    make: Any, position: int, token: int | str
) -> None:
    widget = make()
    widget.run()
    assert widget.wait(PATIENCE)
    text = widget.text
    act(widget, "branch", position=position, token=token)
    assert ("IndexError" if position else "ValueError") in widget.error
    assert widget.text == text
    assert widget.wait(PATIENCE)


def test_an_error_stands_in_the_panel_and_the_text_stays(
    make: Any, lettered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget = make("x" * 250, max_new_tokens=40)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the disk is <b>full</b>")

    with lettered.model.register_forward_pre_hook(fail):
        widget.run()
        assert widget.wait(PATIENCE)
    assert widget.error == "RuntimeError: the disk is <b>full</b>"
    assert widget.note == "stopped by an error; the text is kept"
    assert len(widget.tokens) == 3
    widget.resume()
    assert widget.wait(PATIENCE)
    assert len(widget.tokens) == 43


def test_every_run_and_branch_is_a_text_and_all_are_kept(make: Any, lettered: Any) -> None:
    pytest.importorskip("pandas")
    widget = make()
    widget.run()
    assert widget.wait(PATIENCE)
    first = widget.text
    act(widget, "branch", position=3, token="x")
    assert widget.wait(PATIENCE)
    branched = widget.text
    assert (widget.texts, widget.shown) == (2, 1)
    assert widget.origin == "branched from text 1 at token 4"
    act(widget, "compare", text=0)
    assert "".join(cell[0] for cell in widget.aside) == first
    act(widget, "choose", text=0)
    until(lambda: "".join(cell[0] for cell in widget.cells) == first)
    assert (widget.text, widget.beside) == (first, None)
    act(widget, "resume")
    assert widget.wait(PATIENCE)
    assert widget.text.startswith(first)
    assert len(widget.to_pandas()) == 24
    assert widget.to_markdown() == f"> Hello\n\n{widget.text}\n"
    act(widget, "choose", text=1)
    assert widget.text == branched

    # A run that fails before its first token leaves everything as it was.
    def fail(*_: Any) -> None:
        raise RuntimeError("no server")

    with lettered.model.register_forward_pre_hook(fail):
        act(widget, "run")
        assert widget.wait(PATIENCE)
    assert (widget.texts, widget.shown, widget.text) == (2, 1, branched)
    act(widget, "choose", text=2)
    assert "IndexError: text: 2" in widget.error


def test_an_adapter_is_named_and_can_be_switched_off(lettered: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(lettered.model), config, adapter_name="my-style")
    widget = GenerateWidget(model, "Hello", tokenizer=lettered.tokenizer, max_new_tokens=8)
    plain = GenerateWidget(lettered.model, "Hello", tokenizer=lettered.tokenizer, max_new_tokens=8)
    try:
        assert (widget.adapters, plain.adapters) == (["my-style"], [])
        probabilities = []
        for one, on in ((widget, True), (widget, False), (plain, True)):
            if one is widget:
                act(one, "switch_adapters", on=on)
            one.run()
            assert one.wait(PATIENCE)
            assert not one.error
            probabilities.append(one.tokens[0].probability)
        assert widget.adapters_on is False
        assert probabilities[1] == pytest.approx(probabilities[2])
        assert probabilities[0] != pytest.approx(probabilities[2])
    finally:
        widget.close()
        plain.close()


def test_a_widget_is_steered_and_the_notebook_is_not(make: Any, lettered: Any) -> None:
    torch.manual_seed(0)
    hidden = lettered.model.config.hidden_size
    vector = SteeringVector("tiny", 1, torch.randn(hidden))
    inputs = lettered.tokenizer("Hello", return_tensors="pt")

    def plain() -> list[int]:
        ids = lettered.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        return list(ids[0].tolist())

    before = plain()
    widget = make(steer=vector, strength=0)
    for strength in (0, 8, 0):
        widget.strength = strength
        widget.run()
        assert widget.wait(PATIENCE)
        ids = widget.writer.draft.ids
        if strength:
            assert plain() == before
            with vector.steer(lettered.model, strength):
                assert ids == plain()
            assert ids != before
        else:
            assert ids == before
    assert widget.steering == "steering, block 1"


def test_hostile_text_is_escaped_in_the_picture(make: Any) -> None:
    widget = make("<script>alert(1)</script>")
    widget.run()
    assert widget.wait(PATIENCE)
    widget.branch(0, "<img src=x onerror=alert(1)>")
    assert widget.wait(PATIENCE)
    assert "<script>" not in widget.picture()
    assert "<img" not in widget.picture()
    assert widget.text.startswith("<img src=x onerror=alert(1)>")


def test_cells_of_a_long_text_are_pages_that_never_change(lettered: Any) -> None:
    shown = Cells(Vocabulary(lettered.tokenizer))
    draft = Draft([5, 6])

    def follow() -> bool:
        cut = shown.cut(draft.prompt, draft.tokens)
        shown.grow(draft.tokens)
        assert all(len(page) == PAGE for page in shown.pages)
        assert len(shown.tail) < PAGE
        cells = [cell for page in shown.pages for cell in page] + shown.tail
        text = "".join(cell[0] for cell in cells if not cell[2])
        assert text == lettered.tokenizer.decode(draft.written, skip_special_tokens=True)
        return cut

    for step in range(20 * PAGE):
        draft.tokens.append(Token(40 + step % 60, 0.5, ((40, 0.5), (41, 0.25))))
        assert not follow()
        if step == PAGE:
            first = json.dumps(shown.pages)
    assert json.dumps(shown.pages[:1]) == first
    for position in (9 * PAGE + 5, 7 * PAGE, 6 * PAGE - 1, 20, 0):
        draft = draft.branch(position, [50])
        assert follow()
    assert not shown.cut(draft.prompt, draft.tokens)


def test_the_views_are_told_soon_and_not_too_often() -> None:
    done: list[float] = []
    throttle = Throttle(lambda: done.append(time.monotonic()), period=0.05)
    began = time.monotonic()
    while time.monotonic() < began + 0.3:
        throttle.ask()
        time.sleep(0.001)
    asked = time.monotonic()
    until(lambda: done[-1] >= asked or throttle._thread is None)
    assert done
    assert all(later - one >= 0.05 for one, later in itertools.pairwise(done))
    until(lambda: throttle._thread is None)
    assert "swarm_notebook-throttle" not in {thread.name for thread in threading.enumerate()}
    throttle.ask()
    until(lambda: done[-1] > asked)


def test_what_a_view_gets_is_never_a_half_or_older_than_what_it_has(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget = make(max_new_tokens=100)
    widget.run()
    assert widget.wait(PATIENCE)
    reached, go_on = threading.Event(), threading.Event()
    cut = Cells.cut

    def held_up(cells: Cells, prompt: list[int], tokens: list[Token]) -> bool:
        found = cut(cells, prompt, tokens)
        if found and not reached.is_set():
            reached.set()
            assert go_on.wait(PATIENCE)
        return found

    monkeypatch.setattr(Cells, "cut", held_up)
    lengths: list[int] = []
    widget.observe(lambda change: lengths.append(len(change["new"])), "tail")
    opened: list[str] = []

    def text() -> str:
        return "".join(cell[0] for cell in shown_cells(widget.get_state()) if not cell[2])

    widget.edit(20, " ")  # another thread tells the views, and is held up in the middle of it
    assert reached.wait(PATIENCE)
    others = [
        threading.Thread(target=widget._show),
        threading.Thread(target=lambda: opened.append(text())),  # a page that is opened now
    ]
    for other in others:
        other.start()
    for other in others:
        other.join(0.5)  # time to get in between, if that were possible
    go_on.set()
    for other in others:
        other.join(PATIENCE)
    assert opened == [widget.text]
    assert lengths == [20, 21]


def test_views_go_on_after_an_update_that_failed() -> None:
    done: list[int] = []

    def work() -> None:
        done.append(1)
        if len(done) == 1:
            raise RuntimeError("this one fails")

    throttle = Throttle(work)
    throttle.ask()
    until(lambda: bool(done))
    throttle.ask()
    until(lambda: len(done) > 1)
