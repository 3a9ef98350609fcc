"""How far honest servers differ, and what audits tell from it: false alarms, and lies by evidence.

Prints JSON lines. Blocks of the demo model answer for texts of this repository in several honest
ways (one pass, short pieces with a cache, beside longer rows, eager attention, on a GPU also token
by token through CUDA graphs and compiled blocks); each answer is compared, 32 tokens at a time,
with a replay in float32 and one in the answer's own dtype, as an audit does. Who replays may be a
server of another kind (`--replay`). `alarms` is to be 0, and so is `alarms_together`, of the audits
of each way added up. `--evidence` sets the liars of the tests beside them, and two that cheat a
little: how many audits find each, and its ratio by how many tokens are taken together (the lines
that come last count). `--gradients` audits backward passes instead, the gradients of states.

    python benchmarks/audits.py [--audits 1000] [--blocks 10:20] [--gradients]
                                [--server bfloat16@cpu] [--replay float32@cuda] [--model FOLDER]

A kind is a dtype, ``@`` and a device, and ``/`` and bits if the weights are packed. Both servers
then have the same packed weights if their dtype is the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swarm_notebook.checkpoint.files.source import ModelSource, resolve
from swarm_notebook.checkpoint.packed import PackedWeight, replace
from swarm_notebook.checkpoint.parts.partial import load_blocks, load_edges
from swarm_notebook.client.audit import limits
from swarm_notebook.client.audit.comparison import Errors, compare, compare_gradients
from swarm_notebook.client.audit.evidence import Evidence
from swarm_notebook.client.passes.backward import PassGradients
from swarm_notebook.server.engine.passes import backward, cast, stateless
from swarm_notebook.server.engine.products import few_bits
from swarm_notebook.server.engine.quantising.loading import load_quantised
from swarm_notebook.server.engine.requests import Backward, Forward, Step
from swarm_notebook.server.engine.scheduling.pieces import run_whole
from swarm_notebook.server.engine.span import Span
from swarm_notebook.server.engine.steps.batching import Batching
from swarm_notebook.server.engine.steps.decode import Decoding
from swarm_notebook.server.engine.steps.session_state import SessionState

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import liars
from support.random_sessions import prepared

LENGTH = 128
EVIDENCE = (32, 128, 512, 2048)
# Between two lines about what was found so far.
TELL_SECONDS = 5.0


@dataclass(frozen=True)
class Kind:
    """What a server computes with."""

    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    bits: float | None = None

    @classmethod
    def parse(cls, text: str) -> Kind:
        """Of ``bfloat16``, ``bfloat16@cuda`` or ``bfloat16@cuda/4.5``."""
        rest, _, bits = text.partition("/")
        dtype, _, device = rest.partition("@")
        return cls(getattr(torch, dtype), device or "cpu", float(bits) if bits else None)

    def __str__(self) -> str:
        whole = f"{self.dtype}@{self.device}".removeprefix("torch.")
        return whole if self.bits is None else f"{whole}/{self.bits:g}"


@dataclass
class Extremes:
    """The largest of everything that was seen, and how many alarms there were.

    Attributes:
        typical: mean and standard deviation of the logarithm of ratios over so many tokens.
    """

    audits: int = 0
    alarms: int = 0
    alarms_together: int = 0
    most: dict[str, float] = field(default_factory=dict)
    typical: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, errors: Errors, together: str = "", *, back: bool = False) -> None:
        """Take an audit of an answer; `together` says why several are wrong, if they are."""
        self.audits += 1
        self.alarms += bool(limits.judged(errors, Errors(), torch.float32, back=back)[1])
        self.alarms_together += bool(together)
        found = {"mean": errors.mean, "largest": errors.largest, "gain": abs(errors.mean_gain)}
        if errors.ratio is not None:
            found |= {"ratio": errors.ratio, "outliers": errors.outliers}
            found["gain of error"] = abs(errors.mean_gain) * errors.tokens / errors.twin
        for name, value in found.items():
            self.most[name] = max(self.most.get(name, 0.0), value)


def texts(source: ModelSource, length: int) -> Iterator[torch.Tensor]:
    """Token ids ``[length]`` from the files of this repository, again and again.

    Random ones for a model without a tokenizer.
    """
    root, tokenizer = Path(__file__).parents[1], source.tokenizer()
    draw = torch.Generator().manual_seed(0)
    while tokenizer is None:
        yield torch.randint(source.config().vocab_size, (length,), generator=draw)
    files = sorted([*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("tests/**/*.py")])
    while True:
        for file in files:
            ids = tokenizer(re.sub(r"\s+", " ", file.read_text()))["input_ids"]
            for begin in range(0, len(ids) - length, length):
                yield torch.tensor(ids[begin : begin + length])


class Bench:
    """Blocks ``[start, end)`` as one server has them and as a witness does, and what goes in."""

    def __init__(
        self,
        start: int,
        end: int,
        kind: Kind,
        witness: Kind | None = None,
        model: str | None = None,
    ):
        self.source = source = resolve(model)
        self.start, self.end, self.kind, self.dtype = start, end, kind, kind.dtype
        self._embed = load_edges(source, dtype=torch.float32)[0].get_input_embeddings()
        self._before = load_blocks(source, 0, start, dtype=torch.float32).model if start else None
        self.span = _span(source, start, end, kind)
        self.layers = self.span.layers
        self.witness = self.span
        if witness is not None and witness != kind:
            self.witness = _span(source, start, end, witness)
        self._decoding: Decoding | None = None

    def texts(self, length: int) -> Iterator[torch.Tensor]:
        return texts(self.source, length)

    @torch.inference_mode()
    def inputs(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self._embed(ids)
        if self._before is not None:
            hidden = self._before(inputs_embeds=hidden, use_cache=False).last_hidden_state
        # As it travels to a server of halves.
        return hidden.to(self.dtype).float()

    def answers(self, hidden: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The same output ``[1, positions, hidden size]`` in several honest ways."""
        blocks, count = (self.start, self.end), self.end - self.start
        request, length = Forward(blocks, hidden), hidden.shape[1]
        yield "one pass", self._run(request)
        for size in (7, 32):
            yield f"pieces of {size}", self._run(request, size * count)
        rows = hidden.shape[0]
        longer = torch.cat([hidden.new_zeros(rows, 24, hidden.shape[2]), hidden], dim=1)
        both = torch.cat([longer, longer.roll(40, 1)])
        mask = torch.ones(both.shape[:2], dtype=torch.long)
        mask[:rows, :24] = 0
        beside = self._run(Forward(blocks, both, attention_mask=mask))
        yield "beside another row", beside[:rows, -length:]
        config: Any = self.span.config
        kept, config._attn_implementation = config._attn_implementation, "eager"
        yield "eager", self._run(request)
        config._attn_implementation = kept
        if self.kind.device != "cpu":
            yield self._stepped(hidden)

    def _stepped(self, hidden: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Token by token through CUDA graphs, and through compiled blocks once there are some."""
        rows, length, size = hidden.shape
        if self._decoding is None:
            self._decoding = Decoding.try_out(self.span, size, 4 * rows * length, capture=True)
            self._decoding.compile_beside()
        batching = Batching(possible=True, decoding=self._decoding)
        compiled = ((self.start, self.end), rows) in self._decoding.compiled
        state = SessionState(self.span, context=None, cache=self._decoding.cache())
        found = []
        for position in range(length):
            token = hidden[:, position : position + 1]
            step = Step((self.start, self.end), token, position=position)
            (got,) = batching.run([prepared(state, step)])
            if isinstance(got, Exception):
                raise got
            found.append(got[0].float())
        state.cache.release()
        return "steps, compiled" if compiled else "steps, graphs", torch.cat(found, dim=1)

    def replays(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In float32 and, if that is another one, in the server's own dtype."""
        twin = None if self.dtype == torch.float32 else self._replay(hidden, self.dtype)
        return self._replay(hidden, torch.float32), twin

    def _replay(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        request = Forward((self.start, self.end), hidden)
        if self.witness.dtype == dtype:
            return run_whole(stateless.forward(self.witness, request))[0].float()
        return run_whole(cast.forward(self.witness, request, dtype))[0].float()

    def _run(self, request: Forward, room: int = 1 << 60) -> torch.Tensor:
        return run_whole(stateless.forward(self.span, request), room)[0].float()


def _span(source: ModelSource, start: int, end: int, kind: Kind) -> Span:
    """The blocks of a server. Packed ones are packed on the CPU: so they are the same anywhere."""
    device = "cpu" if kind.bits else kind.device
    reading: dict[str, Any] = {"dtype": kind.dtype, "device": device}
    if kind.bits is None:
        loaded = load_blocks(source, start, end, **reading)
        return Span(loaded.model, loaded.layers_name, start)
    loaded, _ = load_quantised(source, start, end, bits=kind.bits, **reading)
    kept = [
        (module, name, weight.packed)
        for module in loaded.model.modules()
        for name, weight in module._parameters.items()
        if isinstance(weight, PackedWeight)
    ]
    for module, name, _ in kept:
        module._parameters[name] = None
    loaded.model.to(kind.device)
    for module, name, packed in kept:
        there = packed.around([part.to(kind.device) for part in packed.parts()])
        replace(module, name, there, kind.dtype)
    few_bits.install(loaded.layers)
    return Span(loaded.model, loaded.layers_name, start)


def honest(bench: Bench, audits: int, rows: int, said: dict[str, Any]) -> None:
    """Audits of 32 tokens of honest answers; tells now and then what was found of each way."""
    found, parts = dict[str, Extremes](), dict[str, list[Errors]]()
    source, together, told = bench.texts(LENGTH), Evidence(), time.monotonic()
    done = 0
    while done < audits:
        hidden = bench.inputs(torch.stack(list(itertools.islice(source, rows))))
        reference, twin = bench.replays(hidden)
        for way, answer in bench.answers(hidden):
            of_way = found.setdefault(way, Extremes())
            for part in _windows(answer, reference, twin):
                errors = compare(*part)
                of_way.add(errors, together.add(way, frozenset(), errors))
                parts.setdefault(way, []).append(errors)
        done = sum(one.audits for one in found.values())
        if done >= audits or time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            for way, of_way in found.items():
                for size in EVIDENCE if twin is not None else ():
                    ratios = list(_ratios(parts[way], size // limits.MIN_TOKENS))
                    of_way.most[f"ratio over {size}"] = max(ratios, default=0.0)
                    of_way.typical[size] = typical(ratios)
            whole = {"audits": done, "alarms": sum(one.alarms for one in found.values())}
            whole["alarms_together"] = sum(one.alarms_together for one in found.values())
            ways = {way: vars(of_way) for way, of_way in found.items()}
            print(json.dumps(said | whole | {"ways": ways}), flush=True)


def typical(ratios: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of their logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    return (statistics.mean(logs), statistics.stdev(logs)) if len(logs) > 1 else (0.0, 0.0)


Found = dict[str, list[list[Errors]]]


def evidence(bench: Any, lies: dict[str, liars.Lie], tokens: int) -> Iterator[Found]:
    """Errors of honest servers and of liars: of each its texts, and of those their audits."""
    found: Found = {}
    source = bench.texts(LENGTH)
    for _ in range(tokens // LENGTH):
        hidden = bench.inputs(next(source)[None])
        reference, twin = bench.replays(hidden)
        answers = {f"honest, {way}": answer for way, answer in bench.answers(hidden)}
        for name, lie in lies.items():
            with liars.lying(bench, lie):
                answers[name] = bench._run(Forward((bench.start, bench.end), hidden))
        for name, answer in answers.items():
            parts = [compare(*part) for part in _windows(answer, reference, twin)]
            found.setdefault(name, []).append(parts)
        yield found


def told(texts: list[list[Errors]]) -> dict[str, Any]:
    """What audits make of them: one by one, in twos, and added up."""
    every = [one for parts in texts for one in parts]
    wrong = [bool(limits.what_is_wrong(one, torch.float32)) for one in every]
    twos = [any(wrong[at : at + 2]) for at in range(0, len(wrong) - 1, 2)]
    told: dict[str, Any] = {"audits": len(every), "found": sum(wrong)}
    told |= {"twos": len(twos), "found_by_two": sum(twos)}
    if every[0].ratio is not None:
        ratios = {size: list(_ratios(every, size // limits.MIN_TOKENS)) for size in EVIDENCE}
        known = {size: all_ for size, all_ in ratios.items() if all_}
        told["ratios"] = {size: [min(all_), max(all_)] for size, all_ in known.items()}
        told["typical"] = {size: typical(all_) for size, all_ in known.items()}
        told["over"] = {
            size: [sum(one > limits.max_ratio(size) for one in all_), len(all_)]
            for size, all_ in known.items()
        }
    return told


def _ratios(parts: list[Errors], count: int) -> Iterator[float]:
    for begin in range(0, len(parts) - count + 1, count):
        yield sum(parts[begin : begin + count], Errors()).ratio or 0.0


def _windows(
    answer: torch.Tensor, reference: torch.Tensor, twin: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    size = limits.MIN_TOKENS
    for row in range(answer.shape[0]):
        for begin in range(0, answer.shape[1] - size + 1, size):
            cut = slice(row, row + 1), slice(begin, begin + size)
            yield answer[cut], reference[cut], None if twin is None else twin[cut]


def int8_block(layers: list[nn.Module]) -> list[Any]:
    """One block in the middle has weights of 8 bits."""
    return liars.rounded(8)([layers[len(layers) // 2]])


def gradients(bench: Bench, audits: int) -> Extremes:
    """Audits of honest backward passes: of states, for gradients of the output drawn at random."""
    found = Extremes()
    count = bench.end - bench.start
    for request in backwards(bench):
        reference, twin = gradient_replays(bench, request)
        for room in (1 << 60, 32 * 3 * count):
            answer = gradients_of(backward.recompute(bench.span, request), room)
            found.add(compare_gradients(answer, reference, twin)[0], back=True)
        if found.audits >= audits:
            return found
    raise AssertionError("texts never end")


def backwards(bench: Bench) -> Iterator[Backward]:
    """Two rows of text, and a gradient of all of the output."""
    source, draw = bench.texts(LENGTH), torch.Generator().manual_seed(0)
    while True:
        hidden = torch.cat([bench.inputs(next(source)[None]) for _ in range(2)])
        grad = torch.randn(hidden.shape, generator=draw)
        yield Backward((bench.start, bench.end), hidden, grad=grad)


def gradient_replays(bench: Bench, request: Backward) -> tuple[PassGradients, PassGradients | None]:
    """In float32 and, if that is another one, in the server's own dtype."""

    def replay(dtype: torch.dtype) -> PassGradients:
        if bench.witness.dtype == dtype:
            return gradients_of(backward.recompute(bench.witness, request))
        return gradients_of(cast.gradients(bench.witness, request, dtype))

    return replay(torch.float32), None if bench.dtype == torch.float32 else replay(bench.dtype)


def gradients_of(pieces: Any, room: int = 1 << 60) -> PassGradients:
    return PassGradients(run_whole(pieces, room).tensors[0].float().cpu())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--audits", type=int, default=1000)
    parser.add_argument("--server", type=Kind.parse, default=Kind(), metavar="KIND")
    parser.add_argument("--replay", type=Kind.parse, default=None, metavar="KIND")
    parser.add_argument("--rows", type=int, default=1, help="texts at once")
    parser.add_argument("--blocks", default="10:20")
    parser.add_argument("--model", default=None, help="a folder, file or name; else the demo")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--evidence", type=int, default=0, help="of so many tokens")
    given = parser.parse_args()
    start, end = map(int, given.blocks.split(":"))
    bench = Bench(start, end, given.server, given.replay, given.model)
    said = {"server": str(given.server), "replay": str(given.replay or given.server)}
    said["blocks"] = given.blocks
    if given.evidence:
        small = {"int8 in one block": int8_block, "noise of 0.3 %": liars.noise(0.003)}
        torch.manual_seed(0)
        last = time.monotonic()
        for number, found in enumerate(evidence(bench, liars.LIES | small, given.evidence), 1):
            if number * LENGTH < given.evidence and time.monotonic() - last < 6 * TELL_SECONDS:
                continue
            last = time.monotonic()
            for name, texts_ in found.items():
                print(json.dumps(said | {"what": name} | told(texts_)), flush=True)
        return
    if given.gradients:
        found = gradients(bench, given.audits)
        print(json.dumps(said | {"what": "gradients"} | vars(found)), flush=True)
        return
    honest(bench, given.audits, given.rows, said | {"what": "states"})


if __name__ == "__main__":
    main()
