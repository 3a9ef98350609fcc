"""The notebooks, each a process: what they do, compared with the local model, and what they tell.

Facts go to standard output, one JSON object a line: beats, counts, errors. An error of ours that
says what to do is a fair answer to a fault; a wrong number is none.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from swarm_notebook.errors import SwarmError

TOLERANCE = 1e-4
NEW_TOKENS, THREADS = 24, 2
VOCABULARY = 128
# Servers keep the activations of an interrupted training step for two minutes.
CALM_SECONDS = 150.0


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
        self.failed = {"failed acts": 1}

    @property
    def actions(self) -> list[Callable[[], None]]:
        """All that one does."""
        reading = [self.greedy, self.beams, self.padded, self.chat, self.states]
        return [*reading, self.gradients, self.edit, self.leave]

    def act(self) -> None:
        """Do something at random and compare."""
        self.random.choice(self.actions)()

    def once(self) -> None:
        """Do something, and tell of it."""
        self.act()
        tell(counts={"acts": 1})

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


def tell(**fact: Any) -> None:
    sys.stdout.write(json.dumps(fact) + "\n")
    sys.stdout.flush()


class Generation:
    """Greedy texts, each compared with the local model's."""

    def __init__(self, swarm: Any, folder: str, seed: int):
        self.failed = {"failed texts": 1}
        self.remote, self.local = swarm.model, local_model(folder)
        self.noise = torch.Generator().manual_seed(seed)

    def once(self) -> None:
        ids = torch.randint(3, 128, (1, 12), generator=self.noise)
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        options |= {"attention_mask": torch.ones_like(ids)}
        ours = self.remote.generate(ids, stopping_criteria=[self._beat], **options)[0].tolist()
        theirs = self.local.generate(ids, **options)[0].tolist()
        wrong = sum(mine != other for mine, other in zip(ours, theirs, strict=True))
        tell(counts={"tokens": NEW_TOKENS, "wrong": wrong})

    @staticmethod
    def _beat(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        tell(beat="token", at=time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Training:
    """Steps of one LoRA adapter here and there; they are compared, and lost if they fail."""

    def __init__(self, swarm: Any, folder: str, seed: int):
        import peft

        self.failed = {"lost": 1, "steps": 1}
        self.noise = torch.Generator().manual_seed(seed)
        self.models = []
        for model in (copy.deepcopy(swarm.model), local_model(folder)):
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
            self.models.append(peft.get_peft_model(model, config))
        self.optimizer = torch.optim.SGD(self._trained()[1], lr=0.1)

    def once(self) -> None:
        ids = torch.randint(3, 128, (2, 16), generator=self.noise)
        losses = []
        for model in self.models:
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.item())
        lost = int(abs(losses[0] - losses[1]) > TOLERANCE or not self._same_gradients())
        self.optimizer.step()
        # Each step begins with the same weights here and there: rounding would grow otherwise.
        ours, theirs = self._trained()
        with torch.no_grad():
            for mine, other in zip(ours, theirs, strict=True):
                mine.copy_(other)
        tell(beat="step", at=time.monotonic(), counts={"steps": 1, "lost": lost})

    def _same_gradients(self) -> bool:
        ours, theirs = self._trained()
        return all(
            (mine.grad - other.grad).abs().max() <= TOLERANCE * (other.grad.abs().max() + TOLERANCE)
            for mine, other in zip(ours, theirs, strict=True)
        )

    def _trained(self) -> tuple[list[Any], list[Any]]:
        """The trained parameters of the remote and of the local model."""
        ours, theirs = (
            [each for each in model.parameters() if each.requires_grad] for model in self.models
        )
        return ours, theirs


def work_without_a_break(peers: Sequence[str], folder: str, seed: int) -> None:
    """Generate and train for ever, telling of each token and step."""
    import swarm_notebook as sn

    swarm = sn.connect(peers, model=folder)
    _keep([Generation(swarm, folder, seed), Training(swarm, folder, seed)])


def do_anything(peers: Sequence[str], folder: str, seed: int) -> None:
    """Do whatever one does with a model, in several threads with a view of it each."""
    import swarm_notebook as sn

    swarm = sn.connect(peers, model=folder)
    views = [copy.deepcopy(swarm.model) for _ in range(THREADS)]
    _keep([Notebook(view, local_model(folder), seed + number) for number, view in enumerate(views)])


def be_interrupted(peers: Sequence[str], folder: str, seed: int) -> None:
    """Do whatever one does; an interrupt may strike anywhere, and an error be no news."""
    import swarm_notebook as sn

    # A shell that starts something in the background has it ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    swarm = sn.connect(peers, model=folder)
    notebook = Notebook(swarm.model, local_model(folder), seed)
    print("ready", flush=True)
    while True:
        try:
            with contextlib.suppress(SwarmError):
                notebook.act()
        except KeyboardInterrupt:
            print("interrupted", flush=True)


def look(peers: Sequence[str], folder: str, servers: Sequence[str]) -> None:
    """Tell what each server says of itself once it holds nothing for anybody, or after a time.

    What does not answer until then is left out.
    """
    import swarm_notebook as sn

    with sn.connect(peers, model=folder) as swarm:
        deadline, found = time.monotonic() + CALM_SECONDS, {}
        for peer in servers:
            while True:
                try:
                    facts = swarm.info(peer)
                except SwarmError:
                    facts = {}
                told = {name: facts.get(name) for name in ("sessions", "activation_bytes_held")}
                if (facts and not any(told.values())) or time.monotonic() > deadline:
                    break
                time.sleep(0.5)
            if facts:
                held = facts["cache_tokens_total"] - facts["cache_tokens_free"]
                found[peer] = {**told, "cache_tokens_held": held}
    print(json.dumps(found), flush=True)


def _keep(works: Sequence[Any]) -> None:
    threads = [threading.Thread(target=_for_ever, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _for_ever(work: Generation | Training | Notebook) -> None:
    while True:
        try:
            work.once()
        except Exception as error:
            clear = isinstance(error, SwarmError) and len(str(error)) > 20
            tell(error=f"{type(error).__name__}: {error}"[:500], clear=clear, counts=work.failed)
