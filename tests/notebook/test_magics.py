"""``%swarm`` in a real kernel, connected to real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.hosting import HostedSwarm
from support.kernel import Kernel
from support.patience import PATIENCE

ANSWER = "The capital of Germany is Berlin."


@pytest.fixture(scope="module")
def fresh() -> Iterator[Kernel]:
    """A kernel with the extension, connected to nothing."""
    with Kernel() as kernel:
        kernel.run("%load_ext swarm_notebook")
        yield kernel


@pytest.fixture(scope="module")
def connected(demo_swarm: HostedSwarm) -> Iterator[Kernel]:
    """A kernel that has run ``%swarm connect`` to two servers with the demo model."""
    with Kernel() as kernel:
        kernel.run("%load_ext swarm_notebook")
        result = kernel.run(
            f"%swarm connect {' '.join(demo_swarm.initial_peers)} --model {demo_swarm.model}"
        )
        assert "2 servers online, all 30 blocks served" in result.stdout
        yield kernel
        kernel.run("%swarm disconnect")
        assert (
            kernel.value("[n for n in ('model', 'tokenizer', 'swarm') if n in globals()]") == "[]"
        )


def test_help_is_printed_and_nothing_exits(fresh: Kernel) -> None:
    for line in ("%swarm", "%swarm help", "%swarm --help"):
        assert "commands:" in fresh.run(line).stdout
    for line in ("%swarm connect --help", "%swarm help connect"):
        assert "--model MODEL" in fresh.run(line).stdout
    assert "--raw" in fresh.run("%%swarm generate --help\ntext").stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%swarm conect", "'conect' is not a command; did you mean connect?"),
        ("%swarm generate", "required: TEXT"),
        ("%swarm generate -n many hello", "'many' must be a positive integer"),
        ("%swarm generate what's this?", "run %swarm connect first"),
        ("%swarm generate hello --max-tokens 3", "did you mean --max-new-tokens?"),
        ("%swarm connect org/name", "did you mean --model org/name?"),
        ("%swarm generate -o 1x hello", "'1x' is not a variable's name"),
        ("%swarm connect --timeout never", "positive number of seconds"),
        ("%%swarm connect\nx", "'connect' is not a command"),
        ("%swarm status", "run %swarm connect first"),
        ("%swarm own 3", "run %swarm connect first"),
        ("%swarm own", "required: BLOCK"),
        ("%swarm own three", "'three' is not a block; numbers as 3 or -1"),
        ("%swarm map", "run %swarm connect first"),
        ("%swarm serve --blocks 5:5", "not of the form A:B"),
        ("%swarm serve --blocks 3:99 some/where", "ModelNotFound"),
        ("%swarm connect nonsense", "AddressError: initial_peers: 'nonsense'"),
        ("%swarm connect --model no/such/model", "ModelNotFound"),
    ],
)
def test_wrong_use_is_one_line(fresh: Kernel, line: str, message: str) -> None:
    result = fresh.finish(fresh.start(line))
    assert message in result.stderr
    assert "UsageError" in result.stderr
    assert "Traceback" not in result.stderr


def test_tab_offers_commands_options_and_their_values(fresh: Kernel) -> None:
    assert fresh.complete("%swarm ge") == ["generate"]
    assert set(fresh.complete("%swarm ")) >= {"connect", "status", "route", "generate", "help"}
    assert fresh.complete("%swarm connect --mo") == ["--model"]
    assert fresh.complete("%swarm connect --dtype b") == ["bfloat16"]
    assert fresh.complete("%%swarm ge") == ["generate"]
    assert "--raw" in fresh.complete("%%swarm generate --ra")
    assert fresh.complete("%swarm ow") == ["own"]
    assert fresh.complete("%swarm connect --ow") == ["--own"]


def test_connect_gives_an_ordinary_model(connected: Kernel) -> None:
    connected.run("from transformers import LlamaForCausalLM")
    assert connected.value("isinstance(model, LlamaForCausalLM)") == "True"
    assert connected.value("swarm.model is model and swarm.tokenizer is tokenizer") == "True"


def test_status_and_route(connected: Kernel) -> None:
    status = connected.run("%swarm status")
    assert "local-0  0:15    online" in status.plain
    assert "sn-view" in status.displayed[-1]["text/html"]
    assert "local-0 [0:15] -> local-1 [15:30]" in connected.run("%swarm route").plain
    assert not connected.run("%swarm status -o seen").displayed
    assert connected.value("list(seen.to_pandas()['name'])") == "['local-0', 'local-1']"


def test_map_shows_a_widget_with_its_picture(connected: Kernel) -> None:
    shown = connected.run("%swarm map")
    assert "SwarmMap: " in shown.plain
    assert "2 servers online, all 30 blocks served" in shown.plain
    assert "local-0" in shown.displayed[-1]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown.displayed[-1]
    assert not connected.run("%swarm map -o seen").displayed
    assert connected.value("[row[1:4] for row in seen.servers]") == (
        "[['local-0', 0, 15], ['local-1', 15, 30]]"
    )
    assert connected.value("(seen.refresh(), seen.error)") == "(None, '')"


def test_generate_streams_a_chat_answer_and_stores_it(connected: Kernel) -> None:
    result = connected.run("%swarm generate What is the capital of Germany? -o answer")
    assert result.stdout == ANSWER + "\n"
    assert not result.displayed
    assert connected.value("answer") == repr(ANSWER)


def test_a_cell_as_the_prompt_raw(connected: Kernel) -> None:
    result = connected.run("%%swarm generate --raw -n 2\nThe capital of France is")
    assert result.stdout == " Paris.\n"


def test_generate_in_the_background_and_chat(connected: Kernel) -> None:
    line = '%swarm generate --widget "What is the capital of Germany?" -n 20'
    shown = connected.run(line)
    assert "GenerateWidget: " in shown.plain
    assert "application/vnd.jupyter.widget-view+json" in shown.displayed[-1]
    connected.run(f"{line} -o writer")
    assert connected.value(f"(writer.wait({PATIENCE}), writer.text)") == f"(True, {ANSWER!r})"
    assert "ChatWidget: " in connected.run("%swarm chat --system 'Be brief.' -n 20").plain
    connected.run("chat.send('What is the capital of Germany?')")
    assert connected.value(f"(chat.wait({PATIENCE}), len(chat.messages))") == "(True, 3)"
    wrong = connected.finish(connected.start("%swarm chat --temperature -1"))
    assert "'-1' must be 0 (greedy) or a positive number" in wrong.stderr


def test_sampling_options_reach_the_model(connected: Kernel) -> None:
    line = "%swarm generate --temperature 1.5 --seed {} -n 12 Tell me a story"
    texts = [connected.run(line.format(seed)).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = connected.run("%swarm generate --temperature 0 What is the capital of Germany?")
    assert greedy.stdout == ANSWER + "\n"


def test_interrupt_keeps_the_partial_text_and_the_model(connected: Kernel) -> None:
    cell = connected.start('%swarm generate -n 400 -o part "Tell me a long story about the sea."')
    assert connected.stdout_of(cell)
    connected.manager.interrupt_kernel()
    result = connected.finish(cell)
    assert result.error == "KeyboardInterrupt"
    assert connected.value("0 < len(part.split()) < 300") == "True"
    assert ANSWER in connected.run('%swarm generate "What is the capital of Germany?"').stdout


def test_privacy_reads_a_text_back(connected: Kernel) -> None:
    shown = connected.run('%swarm privacy --tokens 3 "The capital of France" -o found')
    assert not shown.error
    assert "servers can read 100% of 3 tokens" in connected.value("repr(found)")
    assert connected.value("found.boundaries[1].text") == repr("The capital of")


def test_blocks_come_home_and_go(connected: Kernel) -> None:
    assert connected.run("%swarm own 3 -1 5:7").stdout == "At home: blocks 3, 5, 6, 29\n"
    assert connected.value("swarm.owned") == "(3, 5, 6, 29)"
    assert "this notebook" in connected.value("swarm.route()")
    assert connected.run("%swarm release 5:7").stdout == "At home: blocks 3, 29\n"
    assert connected.run("%swarm release").stdout == "At home: no blocks\n"
    wrong = connected.run("%swarm own 30")
    assert "BlocksOutOfRange: blocks: 30; the model has 30 blocks, 0 to 29" in wrong.stderr
    assert connected.value("swarm.owned") == "()"
