"""Joins, leaves, kills and interrupts at random, for as long as you like (``make soak``).

    python tests/soak.py [--seconds 600] [--seed 0] [--device cuda]

A swarm of a tiny Llama: every block twice, on four servers. Notebooks are threads of this process,
each with its own random sequence of generations (greedy, beams, padded prompts, rollbacks by way
of a kept cache), forward passes with hidden states, gradients, hooks that edit, adapters; some are
left in the middle. Two more are processes of their own: they are interrupted (SIGINT) and killed
(SIGKILL). Two of the four servers are killed and started again. Everything that is computed is
compared with the local model.

First comes a fifth of the time as warm-up. Then, with no session open, memory and open files of
the servers that nobody kills are noted; after the rest of the time they must be there again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from support.tiny import tiny_model

from swarm_notebook.server.app import EXPIRE_SECONDS

TOLERANCE = 1e-4
THREADS, PROCESSES = 5, 2
SPANS = [(0, 2), (2, 5), (0, 2), (2, 5)]
STEADY, KILLED = (0, 1), (2, 3)
VOCABULARY = 128
# What may stay: code that was first needed late, a stream from server to server.
MEMORY_MARGIN = 16 << 20
FILES_MARGIN = 4
# An idle server gives back what its allocator keeps when it has seen that nobody asks for anything.
TIDY = 2 * EXPIRE_SECONDS + 1
INTERRUPTS, INTERRUPT_SECONDS = 3, 15.0
# Servers keep the activations of an interrupted training step for two minutes.
CALM_SECONDS = 150.0


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Left(Exception):
    """A notebook stopped caring in the middle."""


class LeaveAt:
    """A stopping criterion that leaves at a token."""

    def __init__(self, token: int):
        self.token, self.count = token, 0

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        self.count += 1
        if self.count == self.token:
            raise Left
        return torch.zeros(len(input_ids), dtype=torch.bool)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def same_text(ours: Any, theirs: Any, prompt: int) -> None:
    """Compare two greedy generations, logits and all.

    Raises:
        AssertionError: they differ. It says how much the local model prefers its own token: where
            that is nothing but rounding, the order in which numbers were added has decided.
    """
    for row, (mine, other) in enumerate(zip(ours.sequences, theirs.sequences, strict=True)):
        for step in range(min(len(ours.logits), len(theirs.logits))):
            logits = theirs.logits[step][row]
            same(ours.logits[step][row], logits)
            token, expected = int(mine[prompt + step]), int(other[prompt + step])
            if token != expected:
                gap = float(logits[expected] - logits[token])
                raise AssertionError(f"{mine} instead of {other}, a gap of {gap} at {step}")
    if ours.sequences.tolist() != theirs.sequences.tolist():
        raise AssertionError(f"tokens differ: {ours.sequences} instead of {theirs.sequences}")


class Notebook:
    """Works with a remote model and its local twin; every method is one thing that one does."""

    def __init__(self, remote: Any, local: Any, seed: int):
        self.remote, self.local = remote, local
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()

    @property
    def actions(self) -> list[Callable[[], None]]:
        """All that one does."""
        reading = [self.greedy, self.beams, self.padded, self.chat, self.states]
        return [*reading, self.gradients, self.edit, self.leave]

    def act(self) -> None:
        """Do something at random and compare."""
        action = self.random.choice(self.actions)
        action()
        self.done[action.__name__] += 1

    def greedy(self) -> None:
        self._generate(self._ids(1, self.random.choice([3, 20, 150])))

    def beams(self) -> None:
        self._generate(self._ids(2, 9), num_beams=3)

    def padded(self) -> None:
        ids, mask = self._ids(3, 12), torch.ones(3, 12, dtype=torch.long)
        for row, pads in enumerate((0, 5, 9)):
            ids[row, :pads], mask[row, :pads] = 0, 0
        self._generate(ids, attention_mask=mask)

    def chat(self) -> None:
        """Two turns on one cache, the second after a rollback."""
        ids = self._ids(1, 12)
        more = torch.cat([ids[:, :7], self._ids(1, 4)], dim=1)
        with torch.no_grad():
            cache = self.remote(ids, use_cache=True).past_key_values
            cache.crop(-5)
            got = self.remote(more[:, 7:], past_key_values=cache, use_cache=True).logits
            same(got, self.local(more).logits[:, 7:])

    def states(self) -> None:
        ids = self._ids(2, 15)
        with torch.no_grad():
            ours = self.remote(ids, output_hidden_states=True).hidden_states
            theirs = self.local(ids, output_hidden_states=True).hidden_states
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)

    def gradients(self) -> None:
        ids = self._ids(2, 15)
        found = []
        for model in (self.remote, self.local):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=ids).loss.backward()
            found.append(embedded.grad)
        same(found[0] / found[1].abs().max(), found[1] / found[1].abs().max())

    def edit(self) -> None:
        """A hook steers a block while tokens are generated."""
        index, scale = self.random.randrange(5), self.random.uniform(0.5, 1.5)

        def steer(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output * scale

        handles = [
            model.model.layers[index].register_forward_hook(steer)
            for model in (self.remote, self.local)
        ]
        try:
            self._generate(self._ids(1, 10))
        finally:
            for handle in handles:
                handle.remove()

    def leave(self) -> None:
        """Stop in the middle of a generation."""
        with contextlib.suppress(Left):
            stop = [LeaveAt(self.random.randint(1, 8))]
            self.remote.generate(self._ids(1, 20), max_new_tokens=12, stopping_criteria=stop)

    def _ids(self, rows: int, length: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(self.random.randrange(1 << 30))
        return torch.randint(3, VOCABULARY, (rows, length), generator=noise)

    def _generate(self, ids: torch.Tensor, **options: Any) -> None:
        options = {"attention_mask": torch.ones_like(ids), **options}
        options |= {"max_new_tokens": self.random.randint(2, 16), "do_sample": False}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        ours = self.remote.generate(ids, **options)
        theirs = self.local.generate(ids, **options)
        if "num_beams" not in options:
            same_text(ours, theirs, ids.shape[1])
        elif ours.sequences.tolist() != theirs.sequences.tolist():
            raise AssertionError(f"{ours.sequences} instead of {theirs.sequences}, {options}")


def local_model(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def notebook_process(peers: Sequence[str], folder: str, seed: int) -> None:
    """A notebook of its own, which is interrupted now and then: SIGINT may strike anywhere."""
    import swarm_notebook as sn

    # A shell that starts something in the background has it ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    swarm = sn.connect(peers, model=folder)
    notebook = Notebook(swarm.model, local_model(folder), seed)
    print("ready", flush=True)
    while True:
        try:
            notebook.act()
        except KeyboardInterrupt:
            print("interrupted", flush=True)


class Soak:
    """The swarm, those who use it, and those who disturb it."""

    def __init__(self, local: Any, swarm: Any, folder: Path, seed: int):
        self.local, self.swarm, self.folder = local, swarm, folder
        self.random = random.Random(seed)
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self._stop = threading.Event()

    def run(self, seconds: float) -> None:
        """All of them at once, for a time; then everybody leaves."""
        self._stop.clear()
        works: list[Callable[[], None]] = [self._notebook] * THREADS
        works += [self._process] * PROCESSES + [self._killer]
        threads = [
            threading.Thread(target=self._guarded, args=(work, self.random.randrange(1 << 30)))
            for work in works
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.failures:
            time.sleep(0.5)
        self._stop.set()
        for thread in threads:
            thread.join()
        for number in KILLED:
            self._revive(number)

    def calm(self) -> dict[str, Any]:
        """With nobody there: what the servers that nobody kills take."""
        gc.collect()
        servers = [self.local.servers[number] for number in STEADY]
        told = [self._calm_facts(server) for server in servers]
        time.sleep(TIDY)
        taken: dict[str, Any] = {}
        for server, facts in zip(servers, told, strict=True):
            process = psutil.Process(server.pid)
            taken[str(server.blocks)] = {
                "sessions": facts["sessions"],
                "activation_bytes_held": facts["activation_bytes_held"],
                "cache_tokens_held": facts["cache_tokens_total"] - facts["cache_tokens_free"],
                "memory": process.memory_info().rss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }
        return taken

    def _calm_facts(self, server: Any) -> dict[str, Any]:
        """What a server says once it holds nothing for anybody, or after some time."""
        deadline = time.monotonic() + CALM_SECONDS
        while True:
            facts = self.swarm.info(server.peer_id)
            held = facts["sessions"] or facts["activation_bytes_held"]
            if not held or time.monotonic() > deadline:
                return facts
            time.sleep(0.5)

    def _guarded(self, work: Callable[[random.Random], None], seed: int) -> None:
        try:
            work(random.Random(seed))
        except Exception:
            self.failures.append(f"seed {seed}: {traceback.format_exc()}")

    def _notebook(self, dice: random.Random) -> None:
        """A thread with its own view of the model."""
        remote = copy.deepcopy(self.swarm.model)
        notebook = Notebook(remote, local_model(self.folder), dice.randrange(1 << 30))
        while not self._stop.is_set():
            notebook.act()
        self.done += notebook.done

    def _process(self, dice: random.Random) -> None:
        """A process that is interrupted some times and then killed, again and again."""
        while not self._stop.is_set():
            command = [sys.executable, __file__, "--notebook", str(self.folder)]
            command += ["--seed", str(dice.randrange(1 << 30))]
            command += ["--peers", *self.local.initial_peers]
            with (
                tempfile.TemporaryFile("w+") as errors,
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                ) as child,
            ):
                try:
                    self._disturb(child, dice)
                    if child.poll() is not None:
                        errors.seek(0)
                        raise RuntimeError(f"a notebook ended: {errors.read()[-3000:]}")
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
            self.done["killed notebook"] += 1

    def _disturb(self, child: subprocess.Popen, dice: random.Random) -> None:
        if child.stdout is None or child.stdout.readline() != "ready\n":
            return
        for _ in range(dice.randint(1, 6)):
            if self._stop.wait(dice.uniform(0.2, 3)):
                return
            if not self._interrupt(child):
                return
            self.done["interrupt"] += 1
        self._stop.wait(dice.uniform(0, 1))

    def _interrupt(self, child: subprocess.Popen) -> bool:
        """Interrupt a notebook, again if need be: Python drops what strikes in a finalizer."""
        for _ in range(INTERRUPTS):
            child.send_signal(signal.SIGINT)
            if select.select([child.stdout], [], [], INTERRUPT_SECONDS)[0]:
                return child.stdout is not None and child.stdout.readline() == "interrupted\n"
        raise TimeoutError("a notebook did not notice that it was interrupted")

    def _killer(self, dice: random.Random) -> None:
        """Kills servers that have a double, one at a time."""
        while not self._stop.wait(dice.uniform(5, 20)):
            number = dice.choice(KILLED)
            self.local.servers[number].kill()
            self.done["killed server"] += 1
            self._stop.wait(dice.uniform(0, 5))
            self._revive(number)

    def _revive(self, number: int) -> None:
        server = self.local.servers[number]
        if not server.running:
            server.launch()
            server.join(self.local.initial_peers)
            server.wait_ready(90)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What did not go back to where it was."""
    wrong = []
    for blocks, was in before.items():
        now = after[blocks]
        things = ("sessions", "activation_bytes_held", "cache_tokens_held")
        held = [name for name in things if now[name]]
        wrong += [f"server of {blocks}: {name} is {now[name]}" for name in held]
        if now["memory"] > was["memory"] + MEMORY_MARGIN:
            grown = (now["memory"] - was["memory"]) >> 20
            wrong.append(f"server of {blocks}: {grown} MB more memory than after the warm-up")
        if now["files"] > was["files"] + FILES_MARGIN:
            wrong.append(f"server of {blocks}: {now['files']} open files, {was['files']} before")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the servers compute")
    parser.add_argument("--notebook", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if options.notebook:
        notebook_process(options.peers, options.notebook, options.seed)
    import swarm_notebook as sn

    with tempfile.TemporaryDirectory() as place:
        folder = tiny_model("llama", place)
        with (
            sn.LocalSwarm(folder, SPANS, threads=1, device=options.device) as local,
            sn.connect(local.initial_peers, model=folder) as swarm,
        ):
            soak = Soak(local, swarm, folder, options.seed)
            say("warm-up")
            soak.run(options.seconds / 5)
            before = soak.calm()
            say(f"calm: {before}; {dict(soak.done)}")
            if not soak.failures:
                soak.run(options.seconds * 4 / 5)
            after = soak.calm()
            say(f"calm: {after}")
    wrong = [*soak.failures, *compare(before, after)]
    for text in wrong:
        say(text)
    report = {"seed": options.seed, "done": dict(soak.done), "before": before, "after": after}
    print(json.dumps({**report, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
