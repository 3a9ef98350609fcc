"""What a server's first requests need of a card is there as soon as its weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_model

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.server.engine import throughput
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.decode import Decoding
from swarm_notebook.server.loading.reading import Reading
from swarm_notebook.server.options import ServeOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HIDDEN = 48


def test_nothing_is_compiled_for_steps_when_the_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    from swarm_notebook.server.engine.attention import kernel

    kernels: list[Any] = [kernel._file, kernel._attend, kernel._join]
    for one in kernels:  # what other tests have left
        one.device_caches.clear()
    compiled: list[Any] = []
    compile_one = JITFunction._do_compile

    def noting(self: Any, *arguments: Any, **named: Any) -> Any:
        compiled.append(self)
        return compile_one(self, *arguments, **named)

    monkeypatch.setattr(JITFunction, "_do_compile", noting)
    folder = tiny_model("llama", tmp_path)
    options = ServeOptions(folder, blocks=(1, 4), dtype="bfloat16", device="cuda")
    read = Reading(resolve(folder), options, None, None).run().blocks
    assert {id(one) for one in compiled} >= {id(one) for one in kernels}
    compiled.clear()
    span = Span(read.decoder, read.layers_name, read.start)
    batching = Batching.try_out(span, HIDDEN)
    Decoding.try_out(span, HIDDEN, 1024, capture=True)
    throughput.measure(span, HIDDEN, batching)
    assert not compiled
