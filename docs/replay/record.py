"""Record a session of the widgets for the page that replays it without a kernel.

    make replay

Real widgets on the demo model, two of whose three servers hold the same blocks. A text is written
and a server of it is killed on the way; then the text is branched at every token into every other
that was likely, and a lens is asked for the ranks of what it says last. Whatever the widgets sent
to their views, and when, goes into ``recording.json``; `js/replay/player.js` plays it.
"""

from __future__ import annotations

import base64
import json
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import swarm_notebook as sn
from swarm_notebook.widgets import GenerateWidget, LensWidget, SwarmMap
from swarm_notebook.widgets.parts.base import Widget

RECORDING = Path(__file__).with_name("recording.json")
PROMPT = "Tell a short story about a lighthouse."
TOKENS, KILL_AT = 53, 18
BRANCH_TOKENS = 16
LEAST = 0.04  # of a token's probability: below it, an alternative's text is mostly nonsense
TEXT = "The Eiffel Tower stands in the city of"
FOR_VIEWS = {"tooltip", "tabbable", "layout"}
LAST_SECONDS = 1.5  # of the map, after the text has ended


class Tape:
    """What a widget sends to its views from now on.

    Attributes:
        state: its traits now.
        frames: ``[milliseconds since the start, traits that changed]``.
    """

    def __init__(self, widget: Widget) -> None:
        self.state = {
            name: plain(value)
            for name, value in widget.get_state().items()
            if not name.startswith("_") and name not in FOR_VIEWS
        }
        self.frames: list[tuple[int, dict[str, Any]]] = []
        self._began = time.monotonic()
        widget._send = self._take

    def _take(self, message: dict[str, Any], buffers: Any = None, **_: Any) -> None:
        if message.get("method") != "update":
            return
        state = dict(message["state"])
        for path, data in zip(message.get("buffer_paths", []), buffers or [], strict=True):
            state[path[0]] = data
        at = round(1000 * (time.monotonic() - self._began))
        self.frames.append((at, {name: plain(value) for name, value in state.items()}))


def grown(frames: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
    """Frames whose growing text is told by what is new: ``{"kept": count, "new": [cell, …]}``."""
    before: list[Any] = []
    found = []
    for at, traits in frames:
        tail = traits.get("tail")
        if tail is not None:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(before, tail, strict=False))
            kept = sum(1 for _ in same)
            traits, before = {**traits, "tail": {"kept": kept, "new": tail[kept:]}}, tail
        found.append((at, traits))
    return found


def plain(value: Any) -> Any:
    """As JSON has it; bytes as ``{"base64": …}``."""
    if isinstance(value, bytes | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    return value


def written(local: sn.LocalSwarm, map_: SwarmMap, generate: GenerateWidget) -> dict[str, Any]:
    """A text, in the middle of which a server is killed."""
    tapes = {"map": Tape(map_), "generate": Tape(generate)}
    began = time.time()
    generate.run()
    while len(generate.tokens) < KILL_AT:
        time.sleep(0.01)
    lost = next(peer for peer, start, _ in map_.route if start > 0)
    next(one for one in local.servers if one.peer_id == lost).kill()
    killed = time.time() - began
    generate.wait()
    time.sleep(LAST_SECONDS)
    return {
        "recorded": time.strftime("%Y-%m-%d"),
        "began": began,
        "killed": round(1000 * killed),
        "widgets": {
            name: {"state": tape.state, "frames": grown(list(tape.frames))}
            for name, tape in tapes.items()
        },
    }


def branches(generate: GenerateWidget) -> dict[str, Any]:
    """The texts that follow each likely alternative, by position and token."""
    generate.max_new_tokens = BRANCH_TOKENS
    found = {}
    for position, (token, cell) in enumerate(zip(generate.tokens, generate.cells, strict=True)):
        for other, _, probability in cell[3]:
            if other == token.id or probability < LEAST:
                continue
            generate.choose(0)
            generate.branch(position, other)
            generate.wait()
            found[f"{position}:{other}"] = {
                "cells": generate.cells[position:],
                **{name: getattr(generate, name) for name in ("note", "stats", "origin", "bill")},
            }
    return found


def ranks(lens: LensWidget) -> dict[str, Any]:
    """The ranks of all words that the last token's column shows, by their number."""
    count, words, top = len(lens.blocks), len(lens.words), lens.top
    numbers = memoryview(lens.tops).cast("I")
    last = {
        int(numbers[(block * words + words - 1) * top + place])
        for block in range(count)
        for place in range(top)
    }
    found = {}
    for number in sorted(last):
        lens.rank_number(number)
        while lens.ranking or lens.token != lens.vocabulary[number]:
            time.sleep(0.01)
        found[str(number)] = {"token": lens.token, "ranks": plain(lens.ranks)}
    return found


def main() -> None:
    with sn.LocalSwarm(servers=[(0, 15), (15, 30), (15, 30)], threads=1) as local:
        swarm = sn.connect(local.initial_peers, model=local.model)
        swarm.generate("Warm", max_new_tokens=2)
        map_ = SwarmMap(swarm)
        generate = GenerateWidget(
            swarm, PROMPT, chat=True, do_sample=False, max_new_tokens=TOKENS, seed=0
        )
        lens = LensWidget(swarm, TEXT)
        recording = written(local, map_, generate)
        recording["widgets"]["generate"]["branches"] = branches(generate)
        recording["widgets"]["lens"] = {"state": Tape(lens).state, "ranks": ranks(lens)}
        for widget in (map_, generate, lens):
            widget.close()
        swarm.disconnect()
    text = json.dumps(recording, ensure_ascii=False, separators=(",", ":"))
    RECORDING.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
