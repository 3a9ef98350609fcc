"""Swarms of unlike cards in simulated time, with the product's own places and routes.

    python benchmarks/crowds.py [--seconds 60] [--picture docs/crowds.svg]

Cards join one after the other and take their places, by the code that servers run. Then so many
notebooks, each with one conversation after the other (prompts of 200 tokens, answers of 64), choose
their servers by the code that notebooks run: from what servers announce, from round trips, and
from how busy servers are for others, as every ping tells. How long things take is what `sn.plan`
reckons with. In the last rows cards come and go meanwhile, and servers look for better places.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from places import CARDS, SHAPES, model_of, server_of

from swarm_notebook.client.servers.crowd import Crowd
from swarm_notebook.client.servers.kept import KeptChain
from swarm_notebook.client.servers.routing import ANSWER_TOKENS, Links, Work, best_chain
from swarm_notebook.errors import MissingBlocks
from swarm_notebook.net.dht.records import ServerInfo, ServerSpan, ServerState
from swarm_notebook.planning.machines import KNOWN, Link, Machine
from swarm_notebook.planning.placement import Share, step_seconds
from swarm_notebook.planning.simulation import SimulatedHop, Simulation
from swarm_notebook.report.plot import Line, LineChart
from swarm_notebook.server.presence.flow import Place
from swarm_notebook.server.presence.places import choose, next_move
from swarm_notebook.server.presence.placing import LOOK_SECONDS

PROMPT, ANSWER = 200, 64
PING_SECONDS = 10.0  # as `client/servers/directory.py` refreshes
# Weights come from a disk at a gigabyte per second; to start takes as long as on an H200.
DISK, START_SECONDS = 1e9, 5.0
BANDWIDTH = 125e6
NOTEBOOK = KNOWN["rtx3090"]
LINKS = {"1 ms": 0.001, "40 ms": 0.04, "150 ms": 0.15}


class Swarm:
    """Servers and notebooks of one simulation.

    Args:
        shape: one of `SHAPES`.
        trip: the longest round trip between two peers, in seconds.
        crowded: whether notebooks look at how busy servers are, and prefer one of equals each.
    """

    def __init__(self, shape: str, trip: float, seed: int, *, crowded: bool = True):
        self.model, self.bits = model_of(shape), SHAPES[shape][3]
        self.drawn, self._trip, self._crowded = random.Random(seed), trip, crowded
        self.blocks = len(self.model.blocks)
        self.simulation = Simulation(self.model, self.link, self.route, NOTEBOOK)
        self._far: dict[str, float] = {}
        self._crowds: dict[str, Crowd] = {}
        self._kept: dict[str, KeptChain] = {}
        self._cards: dict[str, Machine] = {}
        self._numbers = itertools.count()
        self.moves = 0

    def link(self, one: str, other: str) -> Link:
        """Each peer is some way from the middle of the network."""
        far = [self._far.setdefault(x, self.drawn.uniform(0.1, 0.5)) for x in (one, other)]
        return Link(self._trip * sum(far), BANDWIDTH)

    def join(self) -> None:
        """A card comes, and serves when its blocks are there."""
        name, card = f"server-{next(self._numbers)}", KNOWN[self.drawn.choice(CARDS)]
        server = server_of(self.model, card, self.bits)
        size = min(server.size, self.blocks)
        start, end = choose(self.places(), self.blocks, size, server.span_rate(size))
        self._cards[name] = card
        self.simulation.add(name, Share(card, start, end, self.bits, 0, 0))

    def leave(self) -> None:
        """A server is gone, from one moment to the next."""
        name = self.drawn.choice([*self.simulation.hosts])
        self.simulation.remove(name)
        del self._cards[name]

    def settle(self) -> None:
        """Servers move until none wants to."""
        while (move := next_move(self.places(), self.blocks)) is not None:
            name = self._at(move[0])
            self.simulation.add(name, self._share(name, move[1]))

    def look(self) -> None:
        """Whose turn it is looks for a better place, and loads its blocks."""
        move = next_move(self.places(), self.blocks) if self.simulation.hosts else None
        if move is not None:
            name = self._at(move[0])
            share = self._share(name, move[1])
            self.simulation.remove(name, told=True)
            size = sum(block.matrices for block in self.model.blocks[: move[1].size])
            ready = START_SECONDS + size * self.bits / 8 / DISK
            self.simulation.at(
                self.simulation.now + ready,
                lambda: self.simulation.add(name, share) if name in self._cards else None,
            )
            self.moves += 1
        self.simulation.at(self.simulation.now + LOOK_SECONDS, self.look)

    def places(self) -> list[Place]:
        return [self._place(name) for name in self.simulation.hosts]

    def open(self, count: int) -> None:
        """So many notebooks begin to work, within some seconds."""
        for number in range(count):
            name = f"notebook-{number}"
            self._crowds[name] = Crowd(name)
            self._kept[name] = KeptChain(
                self._crowds[name], draw=self.drawn.random, clock=lambda: self.simulation.now
            )
            when = self.simulation.now + self.drawn.uniform(0, 5)
            self.simulation.at(
                when,
                lambda name=name: self.simulation.open(name, PROMPT, ANSWER),  # type: ignore[misc]
            )
        self.ping()

    def ping(self) -> None:
        """All notebooks hear how much all servers have done."""
        for peer, host in self.simulation.hosts.items():
            done = sum(host.answered.values())
            for number, (name, crowd) in enumerate(self._crowds.items()):
                crowd.told(peer, done, host.answered.get(name, 0), self.simulation.now)
                crowd.arrived(peer, number)
        self.simulation.at(self.simulation.now + PING_SECONDS, self.ping)

    def route(self, notebook: str, tokens: int) -> Sequence[SimulatedHop]:
        spans = [self._span(name) for name in self.simulation.hosts]
        trips = {one.peer: self.link(notebook, one.peer).round_trip for one in spans}
        links = Links(trips, lambda _one, _other: True)
        try:
            usual = None
            if self._crowded:
                usual = self._kept[notebook].choose(spans, 0, self.blocks, links)
            work = Work(tokens, ANSWER_TOKENS)
            chain = best_chain(spans, 0, self.blocks, links, work=work, usual=usual)
        except MissingBlocks:
            return []
        return [(one.peer, one.start, one.end) for one in chain]

    def _span(self, name: str) -> ServerSpan:
        share = self.simulation.hosts[name].share
        one = Share(share.machine, 0, 1, self.bits, 0, 0)
        server = server_of(self.model, share.machine, self.bits)
        others = [other for other in self.simulation.hosts if other != name]
        info = ServerInfo(
            state=ServerState.ONLINE,
            throughput=server.announced(share.end - share.start),
            inference_rps=1 / step_seconds(self.model, one, 1, 0, None),
            forward_rps=server.rate,
            next_pings={other: self.link(name, other).round_trip for other in others},
        )
        return ServerSpan(name, share.start, share.end, info)

    def _place(self, name: str) -> Place:
        share = self.simulation.hosts[name].share
        count = share.end - share.start
        rate = server_of(self.model, share.machine, self.bits).span_rate(count)
        return Place(share.start, share.end, rate)

    def _at(self, place: Place) -> str:
        return next(name for name in self.simulation.hosts if self._place(name) == place)

    def _share(self, name: str, place: Place) -> Share:
        return Share(self._cards[name], place.start, place.end, self.bits, 0, 0)


def of_crowd(
    shape: str, servers: int, trip: float, notebooks: int, seconds: float, *, crowded: bool = True
) -> tuple[float, float]:
    """Tokens per second of all notebooks together, and of the slowest tenth of them each."""
    swarm = Swarm(shape, trip, seed=1, crowded=crowded)
    for _ in range(servers):
        swarm.join()
    swarm.settle()
    swarm.open(notebooks)
    swarm.simulation.run(2 * seconds)
    rates = sorted(
        sum(when > seconds for when in swarm.simulation.tokens[f"notebook-{number}"]) / seconds
        for number in range(notebooks)
    )
    return sum(rates), rates[len(rates) // 10]


def of_churn(shape: str, servers: int, trip: float, seconds: float, seed: int) -> str:
    """What eight notebooks have of a swarm in which a card comes or goes every half a minute."""
    swarm = Swarm(shape, trip, seed)
    for _ in range(servers):
        swarm.join()
    swarm.settle()
    for number in range(1, int(seconds / 30)):
        swarm.simulation.at(30.0 * number, swarm.leave if number % 2 else swarm.join)
    swarm.open(8)
    swarm.look()
    swarm.simulation.run(seconds)
    times = [swarm.simulation.tokens[f"notebook-{number}"] for number in range(8)]
    gaps = [
        after - before for one in times for before, after in itertools.pairwise([*one, seconds])
    ]
    rate = sum(map(len, times)) / seconds
    return (
        f"{rate:.1f} tokens/s, {swarm.moves} moves, pauses: median {statistics.median(gaps):.2f} s,"
        f" longest {max(gaps):.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--notebooks", type=int, nargs="+", default=[1, 4, 16, 64, 200])
    parser.add_argument("--picture", type=Path, help="where the curves are drawn")
    options = parser.parse_args()
    lines = []
    print("tokens per second together, and of one of the slowest tenth")
    for shape, servers in (("70B-bf16", 16), ("405B-bf16", 40)):
        for name, trip in LINKS.items():
            totals = []
            for count in options.notebooks:
                total, slow = of_crowd(shape, servers, trip, count, options.seconds)
                alone, _ = of_crowd(shape, servers, trip, count, options.seconds, crowded=False)
                totals.append(total)
                print(
                    f"{shape:9} {servers:3} servers {name:>7} {count:4} notebooks: {total:7.1f}"
                    f" and {slow:5.2f}; {alone:7.1f} if they did not look at each other",
                    flush=True,
                )
            if shape == "70B-bf16":
                lines.append(Line(name, range(len(totals)), totals))
    for seed in range(3):
        print(f"70B-bf16, 24 servers come and go: {of_churn('70B-bf16', 24, 0.04, 600, seed)}")
    if options.picture:
        axis = f"notebooks: {', '.join(map(str, options.notebooks))}"
        LineChart("tokens per second together", axis, lines).save(options.picture)


if __name__ == "__main__":
    main()
