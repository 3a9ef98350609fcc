"""What is typed after ``%swarm``: texts as they are, help where it is asked for, Tab."""

from __future__ import annotations

import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from swarm_notebook.notebook.arguments import CommandLine, HelpShown
from swarm_notebook.notebook.magics import unload
from swarm_notebook.notebook.typed import text_of


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("What is the capital of Germany?", "What is the capital of Germany?"),
        ('"What is it?"', "What is it?"),
        ('"What is it?', '"What is it?'),
        ("What's hers, and  what's his?", "What's hers, and  what's his?"),
        ('Say "two words" twice', 'Say "two words" twice'),
        (r'"a \"b\" c"', 'a "b" c'),
        ("5 - 3 = ??", "5 - 3 = ??"),
    ],
)
def test_a_text_goes_through_unharmed(shell: InteractiveShell, typed: str, text: str) -> None:
    code = shell.transform_cell(f"answer = %swarm generate {typed} -n 3")
    assert code.startswith("answer = get_ipython().run_line_magic('swarm', ")
    line = f"generate {typed} -n 3"
    assert code.endswith(f"{line!r})\n")
    arguments = CommandLine("%swarm").parse(line)
    assert (text_of(arguments.prompt, line), arguments.max_new_tokens) == (text, 3)


def test_only_statements_are_taken(shell: InteractiveShell) -> None:
    for code in ('"""\n%swarm generate a?\n"""\n', "x = (7\n%swarm)\n"):
        assert "run_line_magic" not in shell.transform_cell(code)
    cell = shell.transform_cell("%%swarm generate\n%swarm is a magic?\n")
    assert "'%swarm is a magic?\\n'" in cell
    assert "pinfo" in shell.transform_cell("%swarm?")
    both = shell.transform_cell("if True:\n    %swarm lens a \\\n  b?\nc?")
    assert "    get_ipython().run_line_magic('swarm', 'lens a b?')\n" in both
    assert "pinfo" in both
    unload(shell)
    assert "pinfo" in shell.transform_cell("%swarm generate What is the capital of Germany?")


def test_a_question_mark_after_a_command_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("generate?", "generate ?"):
        with pytest.raises(HelpShown):
            CommandLine("%swarm").parse(line)
        shown = capsys.readouterr().out
        assert "generate at most N tokens (default: 256)" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("conect", "'conect' is not a command; did you mean connect?"),
        ("generate a --max_new_tokens 3", "did you mean --max-new-tokens?"),
        ("generate a --max-tokens 3", "did you mean --max-new-tokens?"),
        ("generate a --temperature -1", "'-1' must be 0 (greedy) or a positive number"),
        ("generate a --top-p 2", "'2' must be above 0 and at most 1"),
        ("generate a --seed x", "'x' must be 0 or a positive integer"),
        ("generate a -n 0", "'0' must be a positive integer"),
        ("connect meta-llama/Llama-3.1-8B", "did you mean --model meta-llama/Llama-3.1-8B?"),
    ],
)
def test_what_is_wrong_is_told_with_a_way_out(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CommandLine("%swarm").parse(line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tab_offers_what_fits_and_nothing_of_python(shell: InteractiveShell) -> None:
    def offered(text: str) -> list[str]:
        with provisionalcompleter():
            return sorted(one.text for one in shell.Completer.completions(text, len(text)))

    assert "connect" in offered("%swarm ")
    assert set(offered("%swarm ")) == set(CommandLine("%swarm").commands)
    assert all(option.startswith("--") for option in offered("%swarm generate --"))
    assert offered("%swarm connect --mo") == ["--model"]
    assert offered("x = %swarm connect --dtype b") == ["bfloat16"]
    assert offered("%%swarm ge") == ["generate"]
