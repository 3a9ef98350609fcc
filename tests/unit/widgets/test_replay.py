"""The recorded session of the site has what the widgets of today send, and nothing of a machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm_notebook.widgets import GenerateWidget, LensWidget, SwarmMap
from swarm_notebook.widgets.parts.base import Widget

RECORDING = Path(__file__).parents[3] / "docs" / "replay" / "recording.json"


@pytest.mark.parametrize(
    ("name", "widget"), [("map", SwarmMap), ("generate", GenerateWidget), ("lens", LensWidget)]
)
def test_the_recording_has_the_traits_of_the_widget(name: str, widget: type[Widget]) -> None:
    recorded = json.loads(RECORDING.read_text())["widgets"][name]["state"]
    traits = {trait for trait in widget.class_traits(sync=True) if not trait.startswith("_")}
    assert recorded.keys() == traits - {"layout", "tabbable", "tooltip"}, "make replay"


def test_the_recording_names_no_folder_and_is_small() -> None:
    text = RECORDING.read_text()
    assert len(text) < 600_000
    assert not [word for word in ("/home", "/root", "/tmp", "/Users") if word in text]
