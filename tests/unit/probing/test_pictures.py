"""Static pictures: their colours, ticks and styles, each within its own scope."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from swarm_notebook.probing import PathPatching, grid
from swarm_notebook.report import html, plot
from swarm_notebook.report.plot import Line, LineChart, nice_ticks
from swarm_notebook.widgets.parts import static_html
from swarm_notebook.widgets.training import curves

SCRIPTS = Path(__file__).parents[3] / "js" / "src"
STYLES = {
    "sn-heat": grid._STYLE,
    "sn-figure": plot._STYLE,
    "sn-picture": plot.LETTERS,
    "sn-view": html.STYLE,
    "sn-curves": curves._STYLE,
    "snw": static_html._STYLE,
}


@pytest.mark.parametrize("scope", STYLES)
def test_a_static_style_touches_nothing_else_on_the_page(scope: str) -> None:
    """Pictures and widgets share a page: a rule without its scope would restyle the others."""
    style = re.sub(r"/\*.*?\*/", "", STYLES[scope], flags=re.DOTALL)
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", style.replace("<style>", ""))
    assert rules
    for rule in rules:
        for selector in re.sub(r"\([^)]*\)", "", rule).split(","):
            assert selector.strip().startswith(f".{scope}"), selector
    # And the scope is no class of a widget, nor are its variables.
    sources = "".join(path.read_text() for path in SCRIPTS.iterdir())
    assert not re.search(rf'[ ".]{scope}[ "]', sources)


def test_a_grid_says_what_its_colours_mean() -> None:
    cells = [grid.Cell("a", 0.5), grid.Cell("b", -2.0, "<hint>")]
    shown = grid.as_html("T", ["x", "y"], [("row", cells)], legend=grid.Legend("0", "1", "-1"))
    assert "--snh-strength:0.50;--snh-hue:var(--snh-plus)" in shown
    assert "--snh-strength:1.00;--snh-hue:var(--snh-minus)" in shown
    assert 'title="&lt;hint&gt;"' in shown
    assert "snh-legend" in shown
    assert "∅" not in grid.as_html("T", [""], [])


def test_white_space_and_what_has_no_shape_is_seen() -> None:
    assert grid.visible(" a\n") == "·a↵"
    assert grid.visible("\u00a0") == "U+00A0"
    assert grid.visible("é�") == "é�"
    assert grid.visible("") == "∅"


def test_no_path_is_told_from_a_path_that_carries_nothing() -> None:
    scores = torch.tensor([[math.nan, math.nan], [0.0, 1.0], [0.01, 0.0]])
    paths = PathPatching("m", scores, 1.0, 0.0, [1, 2], [1, 3, "logits"])
    html = paths._repr_html_()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    assert cells == ["", "", "", "1.00", "–", "–"]
    assert "–: no path, the sender is not before the receiver" in html
    whole = PathPatching("m", scores[1:], 1.0, 0.0, [1, 2], [3, "logits"])
    assert "no path" not in whole._repr_html_()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.33, 0.98, [0.2, 0.4, 0.6, 0.8, 1.0]), (0, 29, [0, 10, 20, 30]), (2, 2, [1.5, 2, 2.5])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


def test_a_chart_names_its_lines_and_levels() -> None:
    chart = LineChart(
        "<T>", "block", [Line("acc", [0, 1], [0.5, 0.9], [0.1, 0.1])], [("base", 0.5)]
    )
    assert "&lt;T&gt;" in chart._repr_html_()
    assert "acc from 0.5 to 0.9" in chart.svg()
    assert chart.svg().count("<circle") == 2
    assert "stroke-dasharray" in chart.svg()
    assert ">acc</text>" not in chart.svg()  # one line needs no legend
    two = LineChart("", "block", [Line(name, [0, 1], [0.1, 0.2]) for name in ("<a>", "b")]).svg()
    assert ">&lt;a&gt;</text>" in two
    assert ">b</text>" in two
    shares = LineChart("", "block", [Line("acc", [0], [0.95], [0.1])], within=(0, 1)).svg()
    assert ">1</text>" in shares
    assert ">1.2</text>" not in shares
    assert LineChart("none", "block", []).svg().startswith("<svg")
