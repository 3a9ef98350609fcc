"""What is kept for a backward: the memory that it takes is the memory that is counted."""

from __future__ import annotations

from pathlib import Path

import torch
from support.glibc import allocated, needs_glibc

from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.checkpoint.parts.partial import load_blocks
from swarm_notebook.server.engine.passes.recording import AutogradPass, record
from swarm_notebook.server.engine.requests import Backward, Forward
from swarm_notebook.server.engine.scheduling.pieces import run_whole
from swarm_notebook.server.engine.span import Span

HIDDEN = 48


@needs_glibc
def test_what_is_kept_takes_what_is_counted(tiny_llama: Path) -> None:
    """With few tokens, autograd's nodes are the greater part of it."""
    blocks = load_blocks(resolve(tiny_llama), 1, 4, dtype=torch.float32)
    span = Span(blocks.decoder, blocks.layers_name, 1)

    def keep(passes: int) -> tuple[list[AutogradPass], int]:
        request = Forward((1, 4), torch.randn(1, 2, HIDDEN))
        made = [run_whole(record(span, request, lambda _: True)) for _ in range(passes)]
        return [graph for graph, _, _ in made], sum(size for _, _, size in made)

    first, _ = keep(3)
    before = allocated()
    kept, counted = keep(50)
    taken = allocated() - before
    assert len(first) + len(kept) == 53
    assert 0.7 * taken < counted < 1.5 * taken


def test_a_blocks_gradients_do_not_pass_the_blocks_before_it(tiny_llama: Path) -> None:
    """Though the prompts of all blocks came together."""
    blocks = load_blocks(resolve(tiny_llama), 1, 4, dtype=torch.float32)
    span = Span(blocks.decoder, blocks.layers_name, 1)
    hidden, prompts = torch.randn(2, 3, HIDDEN), torch.randn(3, 1, 2, HIDDEN)
    graph, _, _ = run_whole(record(span, Forward((1, 4), hidden, prompts=prompts), lambda _: True))
    passed: list[torch.Tensor] = []
    graph.outputs[1].register_hook(passed.append)
    grad = torch.randn(2, 3, HIDDEN)
    wanted = Backward((1, 4), hidden, prompts=prompts, grad=grad)
    own = graph.stretch(wanted, 3, 4, grad, keep=True)
    assert [list(one.shape) for one in own.tensors] == [[2, 3, HIDDEN], [1, 2, 2, HIDDEN]]
    assert not passed
    graph.stretch(wanted, 1, 4, grad, keep=False)
    assert passed
