"""This project and Petals, side by side: the same model over two servers of each on this machine.

    make foreign WHAT=petals          once: it installs Petals' last release and tries it
    PETALS=.venv/foreign/petals python benchmarks/beside_petals.py [--repeats 5]

All four servers run all the time, with the blocks of the demo model in float32 and one thread each.
A notebook of each kind asks those of its own kind and, as the protocol is one, those of the other.
They take turns, and the quickest of the repetitions counts: what else the machine does slows all.
Local transformers of either environment stands beside them. Greedy tokens must be the same
everywhere. Prints one JSON object, of seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from common import be_quiet, local_model, say, seconds, summary

THREADS = 1
NEW_TOKENS = 32
ROWS = 8
PROMPT_TOKENS = 512
TRAINED_ROWS, TRAINED_TOKENS = 4, 64
PREFIX = "smollm2-demo"  # Petals' names of models have no dots
PROMPT = "The history of the lighthouse at the end of the cape begins with a storm"


def works(model: Any, prompt: list[int]) -> dict[str, Callable[[], Any]]:
    """What is measured, by its name; the same code for a model of either kind."""
    import torch

    one = torch.tensor([prompt])
    long = one.repeat(1, PROMPT_TOKENS)[:, :PROMPT_TOKENS]
    texts = one.repeat(TRAINED_ROWS, TRAINED_TOKENS)[:, :TRAINED_TOKENS]

    def write(ids: Any, count: int) -> list[list[int]]:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        tokens: list[list[int]] = model.generate(ids, **options).tolist()
        return tokens

    def train() -> None:
        """A step of what stands before the blocks, such as a soft prompt."""
        embedded = model.get_input_embeddings()(texts).detach().requires_grad_(True)
        model(inputs_embeds=embedded).logits.square().mean().backward()
        if embedded.grad is None:
            raise SystemExit("no gradient came back")

    return {
        "one text": lambda: write(one, NEW_TOKENS),
        "eight texts": lambda: write(one.repeat(ROWS, 1), NEW_TOKENS),
        "prompt": lambda: write(long, 1),
        "training": train,
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what comes of it."""
    found: list[Any] = []
    return seconds(lambda: found.append(work())), found[0]


def petals_notebook(folder: str, peers: str, prompt: str) -> None:
    """In Petals' environment: do what each line of standard input names, and time it."""
    import torch

    if peers == "local":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    else:
        from petals import AutoDistributedModelForCausalLM

        model = AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=peers.split(), dht_prefix=PREFIX, torch_dtype=torch.float32
        )
    model.requires_grad_(False)
    todo = works(model, json.loads(prompt))
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        print(json.dumps(timed(todo[line.strip()])), file=answers, flush=True)


class Here:
    """A model of this process."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self._works = works(model, prompt)

    def __call__(self, name: str) -> tuple[float, Any]:
        return timed(self._works[name])


class Asked:
    """A notebook of Petals in a process of its own."""

    def __init__(self, folder: Path, peers: list[str], prompt: list[int]) -> None:
        from foreign.petals_servers import PYTHON, environment

        given = " ".join(peers) or "local"
        self.process = subprocess.Popen(
            [PYTHON, "-W", "ignore", __file__, "--notebook", folder, given, json.dumps(prompt)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def __call__(self, name: str) -> tuple[float, Any]:
        """Seconds, and what was written."""
        stdin, stdout = self.process.stdin, self.process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a process without pipes")
        print(name, file=stdin, flush=True)
        took, written = json.loads(stdout.readline())
        return took, written


def for_both(folder: Path) -> list[int]:
    """Write the demo model as transformers 4.34 reads it, too; the tokens of the prompt."""
    import torch
    from transformers import AutoTokenizer

    from swarm_notebook.checkpoint.files.demo import demo_model

    source = str(demo_model())
    model = local_model(source)
    theta = model.config.rope_parameters["rope_theta"]
    # The head by itself: Petals' model does not know that it is the table of embeddings.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    prompt: list[int] = AutoTokenizer.from_pretrained(source)(PROMPT).input_ids
    return prompt


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """The least seconds of each work, by who asks whom."""
    from foreign.petals_servers import petals

    import swarm_notebook as sn

    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place) / PREFIX
        prompt = for_both(folder)
        ours = stack.enter_context(sn.LocalSwarm(folder, threads=THREADS))
        spans = [server.blocks for server in ours.servers]
        theirs = stack.enter_context(petals(folder, Path(place), *spans))
        peers = {"ours": list(ours.initial_peers), "Petals": [theirs[0].address]}
        asked: dict[str, Callable[[str], tuple[float, Any]]] = {
            "local transformers": Here(local_model(str(folder)), prompt),
            "local transformers of Petals": stack.enter_context(Asked(folder, [], prompt)),
        }
        for servers, at in peers.items():
            swarm = stack.enter_context(sn.connect(at, model=folder))
            asked[f"our notebook, servers: {servers}"] = Here(swarm.model, prompt)
            client = stack.enter_context(Asked(folder, at, prompt))
            asked[f"Petals' notebook, servers: {servers}"] = client
        found: dict[str, dict[str, float]] = {}
        for name in works(None, prompt):
            written = {who: ask(name)[1] for who, ask in asked.items()}  # warm-up
            if any(text != written["local transformers"] for text in written.values()):
                raise SystemExit(f"{name}: not the same tokens: {written}")
            least = found[name] = dict.fromkeys(asked, math.inf)
            for _ in range(repeats):
                for who, ask in asked.items():
                    least[who] = min(least[who], round(ask(name)[0], 4))
                say(f"{name}, load {os.getloadavg()[0]:.1f}: {json.dumps(least)}")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--notebook", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.notebook:
        petals_notebook(*options.notebook)
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    be_quiet(THREADS)
    print(json.dumps(measure(options.repeats)))


if __name__ == "__main__":
    main()
