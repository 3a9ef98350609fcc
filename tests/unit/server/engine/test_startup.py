"""A rehearsal runs what a server runs first, whatever the family, and leaves nothing behind."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from support.tiny import FAMILIES, tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import block_of_zeros, load_blocks
from swarm_notebook.server.engine.attention import paged
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.startup import rehearse
from swarm_notebook.server.engine.steps.decode import Decoding

HIDDEN = 48
# They do not call transformers' attention interface.
PLAIN = {"bloom", "falcon"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_are_rehearsed(family: str, tmp_path: Path) -> None:
    source = resolve(tiny_model(family, tmp_path))
    one = block_of_zeros(source, 1, dtype=torch.float32, device="cpu")
    attended: list[torch.Size] = []
    plain = paged._arithmetic

    def counting(query: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        attended.append(query.shape)
        return plain(query, *rest, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_arithmetic", counting)
        rehearse(Span(one.decoder, one.layers_name, one.start), HIDDEN)
    # Steps of several sessions together, as captured ones attend.
    assert bool(attended) == (family not in PLAIN)


def test_a_rehearsal_beside_steps_changes_nothing_of_them(tmp_path: Path) -> None:
    source = resolve(tiny_model("llama", tmp_path))
    loaded = load_blocks(source, 1, 4, dtype=torch.float32)
    span = Span(loaded.decoder, loaded.layers_name, 1)
    over = threading.Event()

    def again() -> None:
        one = block_of_zeros(source, 1, dtype=torch.float32, device="cpu")
        while not over.is_set():
            rehearse(Span(one.decoder, one.layers_name, one.start), HIDDEN)

    beside = threading.Thread(target=again)
    beside.start()
    try:
        # Refuses steps that differ from those of sessions alone.
        for _ in range(5):
            Decoding.try_out(span, HIDDEN, 256, capture=False)
    finally:
        over.set()
        beside.join()


def test_what_fails_is_said_and_keeps_nobody_from_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from swarm_notebook.server.loading.reading import _rehearse

    one = block_of_zeros(
        resolve(tiny_model("llama", tmp_path)), 1, dtype=torch.float32, device="cpu"
    )
    del one.layers[0].self_attn
    with caplog.at_level(logging.INFO):
        _rehearse(one, torch.device("cpu"))
    assert "a rehearsal beside the reading failed" in caplog.text
