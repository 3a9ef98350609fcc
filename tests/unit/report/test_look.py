"""One look: the palette measured, and one scale of space and of type in widgets and pictures."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from swarm_notebook.probing import grid
from swarm_notebook.report import html, plot
from swarm_notebook.report.palette import MINUS, MOST, PLUS, SERIES, TIMES
from swarm_notebook.widgets.parts import static_html
from swarm_notebook.widgets.training import curves

SCRIPTS = Path(__file__).parents[3] / "js" / "src"
SHEETS = {
    **{path.name: path.read_text() for path in sorted(SCRIPTS.glob("*.css"))},
    "grid": grid._STYLE,
    "html": html.STYLE,
    "plot": plot._STYLE,
    "static_html": static_html._STYLE,
    "curves": curves._STYLE,
}
SPACES = {"0", "2px", "4px", "8px", "12px", "16px", "auto"}
# What sees red, green or blue light too weakly, fully: Machado, Oliveira and Fernandes (2009).
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Background and text of JupyterLab's themes; the text is laid over it with 87 %.
THEMES = {"light": (255, 0), "dark": (0x11, 255)}


def linear(colour: np.ndarray) -> np.ndarray:
    part = colour / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def of(colour: str) -> np.ndarray:
    return np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)], dtype=float)


def over(colour: np.ndarray, below: np.ndarray, share: float) -> np.ndarray:
    return share * colour + (1 - share) * below


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted(float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear light, of which 2.3 is a difference that is just seen."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    part = np.array(to_xyz) @ light / [0.9505, 1, 1.089]
    x, y, z = np.where(part > 0.008856, np.cbrt(part), 7.787 * part + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", THEMES)
def test_both_signs_are_told_apart_by_everybody_and_are_equally_light(theme: str) -> None:
    below, ink = (np.full(3, float(value)) for value in THEMES[theme])
    text = over(ink, below, 0.87)
    for strength in (0.25, 0.5, 1.0):
        plus, minus = (over(of(one), below, MOST * strength) for one in (PLUS, MINUS))
        assert min(contrast(plus, text), contrast(minus, text)) >= 4.5
        assert abs(lab(linear(plus))[0] - lab(linear(minus))[0]) < 2.3
        for seen in BLINDNESS.values():
            pair = [lab(np.clip(np.array(seen) @ linear(one), 0, 1)) for one in (plus, minus)]
            assert np.linalg.norm(pair[0] - pair[1]) > 40 * strength


def test_stronger_is_further_from_the_background_in_both_themes() -> None:
    for value, _ in THEMES.values():
        below = np.full(3, float(value))
        for colour in (PLUS, MINUS):
            steps = [lab(linear(over(of(colour), below, MOST * at / 10))) for at in range(11)]
            away = [float(np.linalg.norm(step - steps[0])) for step in steps]
            assert away == sorted(away)


def test_lines_are_seen_on_white_and_on_black() -> None:
    """3 is what WCAG asks of graphics."""
    for colour in map(of, SERIES):
        assert min(contrast(colour, np.full(3, value)) for value in (255.0, 17.0)) >= 3


def test_white_letters_on_a_reports_colours_can_be_read_in_both_themes() -> None:
    found = re.findall(r"--sn-(good|bad|blue): (#\w{6});", html.STYLE)
    assert len(found) == 3
    for name, colour in found:
        assert contrast(of(colour), np.full(3, 255.0)) >= 4.5, name
        assert contrast(of(colour), np.full(3, 17.0)) >= 3, name  # the bar itself, in the dark


def test_parts_of_a_time_are_told_apart_by_everybody() -> None:
    for colour in map(of, TIMES.values()):
        assert min(contrast(colour, np.full(3, value)) for value in (255.0, 17.0)) >= 3
    for seen in (np.eye(3), *map(np.array, BLINDNESS.values())):
        parts = [lab(np.clip(seen @ linear(of(colour)), 0, 1)) for colour in TIMES.values()]
        for one, other in itertools.combinations(parts, 2):
            assert float(np.linalg.norm(one - other)) >= 20


def test_widgets_have_the_same_colours() -> None:
    theme, monitor = SHEETS["theme.css"], SHEETS["monitor.css"]
    assert f"--sn-plus: {PLUS};" in theme
    assert f"--sn-minus: {MINUS};" in theme
    for number, colour in enumerate(SERIES[1:], start=1):
        assert f'[data-run="{number}"] {{ --run: {colour}; }}' in monitor
    for kind, painted in (("line", "stroke"), ("swatch", "background")):
        (rule,) = re.findall(rf"\.sn-{kind} {{([^}}]*)}}", monitor)
        assert f"{painted}: var(--run, var(--sn-accent));" in rule


@pytest.mark.parametrize("name", SHEETS)
def test_space_is_of_one_scale(name: str) -> None:
    """Parts of a length that is itself relative (em, %) are of prose; 1 px is a hairline."""
    found = re.findall(r"(?<![\w-])(padding|margin|gap)[\w-]*:\s*([^;}]+)", SHEETS[name])
    for kind, values in found:
        for value in values.replace("!important", "").split():
            fits = value in SPACES or value.endswith(("em", "%")) or (kind, value) == ("gap", "1px")
            # Beside a chart is room for its numbers: that is its geometry.
            assert fits or ("sn-plot" in SHEETS[name] and value in {"52px", "-3.5px"}), (
                kind,
                values,
            )


@pytest.mark.parametrize("name", SHEETS)
def test_type_has_three_sizes(name: str) -> None:
    sizes = re.findall(r"font(?:-size)?:[^;}]*?([\d.]+px|[\d.]+em)", SHEETS[name])
    prose = {"1.1em", ".9em"}  # headings and code in an answer, relative to its text
    assert {*sizes} <= {"12px", "13px", "14px"} | (prose if name == "chat.css" else set())
