"""Several notebooks' work at the same time on the same servers, all of it compared with local."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

from chaos.notebooks import Notebook
from support.scene import Scene


def test_each_gets_what_it_would_get_alone(tiny_scene: Scene) -> None:
    """Beams, padding, rollbacks, hooks that edit, gradients, and leaving in the middle."""
    remote, local = tiny_scene.swarm.model, tiny_scene.reference
    # Hooks belong to one notebook, so each has a view of the model.
    notebooks = [Notebook(copy.deepcopy(remote), copy.deepcopy(local), seed) for seed in range(4)]

    def work(notebook: Notebook) -> None:
        for action in notebook.random.sample(notebook.actions, len(notebook.actions)):
            action()

    with ThreadPoolExecutor(len(notebooks)) as threads:
        list(threads.map(work, notebooks))
