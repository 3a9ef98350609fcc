"""What once went wrong for somebody new, in an afternoon of typing and clicking."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress

import pytest
from browser.notebook import HEIGHT, WIDTH, Notebook
from playwright.sync_api import Locator, expect
from playwright.sync_api import TimeoutError as NotInTime

COLOUR = "cell => getComputedStyle(cell).backgroundColor"


def typed(notebook: Notebook, code: str) -> Locator:
    """What the last cell says to code that it refuses."""
    cell = notebook.start(code)
    prompt = notebook.cells.nth(cell).locator(".jp-InputPrompt").first
    expect(prompt).to_have_text(re.compile(r"\[\d+\]"))
    return notebook.output(cell)


@pytest.fixture
def offered(notebook: Notebook) -> Callable[[str], list[str]]:
    """What Tab offers behind some letters in the last cell."""

    def offer(code: str) -> list[str]:
        editor = notebook.cells.last.locator(".cm-content")
        editor.click()
        notebook.page.keyboard.insert_text(code)
        items = notebook.page.locator(".jp-Completer-item")
        # Lab waits a second for the kernel, which may have to import what it is asked about.
        for _ in range(100):
            notebook.page.keyboard.press("Tab")
            with suppress(NotInTime):
                items.first.wait_for(timeout=1500)
                break
        found = items.locator(".jp-Completer-match").all_inner_texts()
        notebook.page.keyboard.press("Escape")
        expect(items.first).to_be_hidden()
        editor.click()
        notebook.page.keyboard.press("Control+a")
        notebook.page.keyboard.press("Delete")
        return found

    return offer


@pytest.fixture
def narrow(notebook: Notebook) -> Callable[[int], None]:
    """Makes the window so wide; it is as it was afterwards."""
    size = notebook.page.set_viewport_size
    try:
        yield lambda width: size({"width": width, "height": HEIGHT})
    finally:
        size({"width": WIDTH, "height": HEIGHT})


def test_a_question_needs_no_quotes(notebook: Notebook) -> None:
    output = notebook.run("%swarm generate -n 12 What is the capital of Germany?")
    expect(output).to_contain_text("The capital of Germany is Berlin.")
    output = notebook.run('%swarm generate -n 3 "One of them is missing')
    expect(output).to_contain_text(re.compile(r"\w"))


def test_a_question_mark_is_help(notebook: Notebook) -> None:
    output = notebook.run("%swarm generate?")
    expect(output).to_contain_text("--max-new-tokens")
    expect(output).to_contain_text("default: 256")


def test_tab_offers_commands_and_options_alone(
    notebook: Notebook, offered: Callable[[str], list[str]]
) -> None:
    commands = offered("%swarm ")
    assert {"connect", "generate", "status"} <= set(commands)
    assert not {"and", "False", "abs"} & set(commands)
    options = offered("%swarm generate --")
    assert "--max-new-tokens" in options
    assert all(re.fullmatch(r"--[a-z][a-z-]+", option) for option in options)
    names = offered("sn.")
    assert "connect" in names
    assert not {"TYPE_CHECKING", "lazy_names", "waiting"} & set(names)


@pytest.mark.parametrize(
    ("code", "meant"),
    [
        ("%swarm generate --max_new_tokens 3 Hi", "did you mean --max-new-tokens?"),
        ("%swarm conect", "did you mean connect?"),
        ("%swarm generate --temperature -1 Hi", "0 (greedy) or a positive number"),
    ],
)
def test_what_is_wrong_is_one_line(notebook: Notebook, code: str, meant: str) -> None:
    output = typed(notebook, code)
    expect(output).to_contain_text(meant)
    expect(output).not_to_contain_text("Traceback")


def test_a_temperature_of_0_is_greedy_and_a_negative_one_is_refused_at_its_field(
    notebook: Notebook,
) -> None:
    view = notebook.run("%swarm generate --widget --raw -n 4 The sky is").get_by_test_id("generate")
    done = view.get_by_test_id("status")
    expect(view.get_by_test_id("token")).to_have_count(4)
    greedy = view.get_by_test_id("token").all_inner_texts()
    view.get_by_test_id("do_sample").check()
    field = view.get_by_test_id("temperature")
    field.fill("-1")
    field.press("Tab")
    expect(view.get_by_test_id("refused")).to_have_text(
        "temperature must be 0 (greedy) or a positive number"
    )
    expect(field).to_have_value("-1")
    field.fill("0")
    field.press("Tab")
    expect(view.get_by_test_id("refused")).to_be_empty()
    view.get_by_test_id("run").click()
    expect(view.get_by_test_id("place")).to_have_text("2/2")
    expect(done).not_to_have_class("sn-busy")
    expect(view.get_by_test_id("token")).to_have_count(4)
    assert view.get_by_test_id("token").all_inner_texts() == greedy
    output = notebook.run("%swarm generate --raw -n 4 --sample --temperature 0 The sky is")
    expect(output).to_contain_text("".join(greedy).strip())


def test_a_run_that_finds_no_server_keeps_the_text_of_before(notebook: Notebook) -> None:
    notebook.run("lost = sn.connect(local.initial_peers, model=local.model, timeout=2)")
    notebook.run("kept = sn.widgets.GenerateWidget(lost, 'The sky is', max_new_tokens=4)")
    view = notebook.run("kept").get_by_test_id("generate")
    view.get_by_test_id("run").click()
    expect(view.get_by_test_id("token")).to_have_count(4)
    written = view.get_by_test_id("token").all_inner_texts()
    notebook.run("lost.connection.directory.min_bits = 99")  # now no server will do
    view.get_by_test_id("prompt").fill("Another prompt")
    view.get_by_test_id("run").click()
    expect(view.get_by_test_id("error")).to_contain_text("MissingBlocks: no server holds")
    if view.get_by_test_id("place").inner_text() != "1/1":
        view.get_by_role("button", name="Previous text").click()
    expect(view.get_by_test_id("token")).to_have_text(written)
    notebook.run("lost.disconnect()")


def test_the_way_of_the_map_avoids_the_dead_and_a_restarted_server_is_used_at_once(
    notebook: Notebook,
) -> None:
    # Servers of its own: those of all tests are to be what they were.
    notebook.run("apart = sn.LocalSwarm(local.model, servers=2)")
    notebook.run("there = sn.connect(apart.initial_peers, model=local.model)")
    view = notebook.run("sn.widgets.SwarmMap(there)").get_by_test_id("map")
    legs = view.get_by_test_id("route").get_by_role("button")
    expect(legs.first).to_have_text("local-0")
    notebook.run("apart.servers[0].kill()")
    expect(view.get_by_test_id("headline")).to_contain_text("MISSING blocks 0:15")
    expect(legs.filter(has_text="local-0")).to_have_count(0)
    notebook.run("apart.servers[0].restart(); answer = there.generate('Hi', max_new_tokens=2)")
    expect(view.get_by_test_id("headline")).to_contain_text("all 30 blocks served")
    expect(legs.first).to_have_text("local-0")
    notebook.run("there.disconnect(); apart.close()")


def test_patching_tells_how_far_it_is_and_shows_what_differs(notebook: Notebook) -> None:
    cell = notebook.start(
        "import time\n"
        "good, bad = (tokenizer(word).input_ids[0] for word in (' happy', ' sad'))\n"
        "def metric(logits):\n"
        "    time.sleep(0.2)\n"  # more than the second after which it is told, on any machine
        "    return logits[:, good] - logits[:, bad]\n"
        "clean, other = (f'She {verb} the game and now is very' for verb in ('won', 'lost'))\n"
        "sn.probing.patch(swarm, clean, other, metric, blocks=range(0, 30, 3))"
    )
    expect(
        notebook.output(cell).get_by_text(re.compile(r"Patching: \d+ of 10 blocks"))
    ).to_be_visible()
    table = notebook.finish(cell).locator("table")
    # Before the word that differs nothing can be restored.
    expect(table.get_by_role("columnheader").nth(1)).to_have_text("·lost")
    expect(table.get_by_text("0.00")).to_have_count(0)
    expect(notebook.output(cell).get_by_text("1, like the clean run")).to_be_visible()
    expect(notebook.output(cell).get_by_text("∅")).to_have_count(0)
    for row in table.locator("tbody tr").all():
        assert row.evaluate(COLOUR) == "rgba(0, 0, 0, 0)"


def test_names_in_a_trace_are_whole_in_a_narrow_cell(
    notebook: Notebook, narrow: Callable[[int], None]
) -> None:
    notebook.run("ids = tokenizer('Once upon a time', return_tensors='pt')")
    notebook.run("model.generate(**ids, max_new_tokens=4, do_sample=False)")
    output = notebook.run("swarm.trace()")
    narrow(480)
    expect(output.locator("svg text").filter(has_text="notebook")).to_be_visible()
    cut = output.locator("svg").evaluate_all(
        """(all) => all.flatMap((svg) => {
          const box = svg.getBoundingClientRect();
          const texts = [...svg.querySelectorAll("text")];
          return texts.filter((text) => {
            const { left, right } = text.getBoundingClientRect();
            return left < box.left - 1 || right > box.right + 1;
          }).map((text) => text.textContent);
        })"""
    )
    assert cut == []


def test_figures_that_grow_move_nothing_in_the_map(
    notebook: Notebook, narrow: Callable[[int], None]
) -> None:
    narrow(600)
    view = notebook.run(
        "again = sn.connect(local.initial_peers, model=local.model)\nsn.widgets.SwarmMap(again)"
    ).get_by_test_id("map")
    expect(view.get_by_test_id("pace")).to_have_text("no tokens yet")
    top = """(map) => map.querySelector("table").getBoundingClientRect().top
      - map.getBoundingClientRect().top"""
    before = view.evaluate(top)
    notebook.run("again.generate('Once upon a time', max_new_tokens=12)")
    expect(view.get_by_test_id("pace")).to_contain_text("tokens so far")
    expect(view.get_by_test_id("bill")).to_contain_text("waiting for servers")
    expect(view.get_by_test_id("privacy")).to_contain_text("local-0, local-")
    assert view.evaluate(top) == before
    notebook.run("again.disconnect()")


def test_what_is_written_briefly_works(notebook: Notebook) -> None:
    notebook.run("states = sn.probing.hidden_states(swarm, ['a text'], blocks=12, pool='last')")
    assert notebook.value("states.blocks") == "[12]"
    notebook.run("with sn.connect(local) as one, sn.connect(local.initial_peers) as two: pass")
    assert notebook.value("one.name == two.name == swarm.name") == "True"
    expect(notebook.run("help(sn.widgets.TrainingMonitor)")).to_contain_text(
        "class TrainingMonitor"
    )


def test_a_monitor_keeps_the_runs_of_before(notebook: Notebook) -> None:
    output = notebook.run(
        "import torch\n"
        "with sn.widgets.TrainingMonitor() as runs:\n"
        "    runs.log(loss=torch.tensor(3.0, requires_grad=True))\n"
        "with runs:\n"
        "    for loss in (2.0, 1.0): runs.log(loss=loss)\n"
        "runs"
    )
    shown = output.get_by_test_id("monitor").last.get_by_test_id("runs").locator("span")
    expect(shown).to_have_text([re.compile("run 1 3"), re.compile("run 2 1")])
    expect(output.locator('[data-mime-type*="stderr"]')).to_have_count(0)
