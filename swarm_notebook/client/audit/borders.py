"""Which of two servers lies about what one has handed to the other.

A print that is not that of what the server before has answered says that one of the two lies, and
not which: the one may have pushed something else than it told the notebook, the other may say that
it got something else. Three things can tell:

- what the sender answered is audited as any other answer, so a sender that told the notebook the
  wrong states, and pushed the right ones, is found by that;
- both are tried with others: the sender hands something to a third server, and a fourth one hands
  something to the receiver. Whoever is contradicted there as well lies, by two against one;
- where there are no others, or nobody is contradicted again, it stays open. The two are kept apart
  for good: what one says to the other goes over the notebook, where nobody can lie about it. Who
  comes into a dispute with another server later, that has had none, is known by that (`Disputes`).

A trial is a session as any other. It is made of the recorded input, its tokens in another order and
each a little changed: nobody has seen it before, so nobody knows that it is a trial.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from swarm_notebook.client.request import Request
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.history import History
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.pipeline import HandOverDisputed, HopLost, Stage, run_pipeline
from swarm_notebook.errors import RemoteError
from swarm_notebook.net.dht.records import ServerState

logger: logging.Logger = logging.getLogger(__name__)

# Of a trial. A token at the end goes by itself: a server may lie in steps of one token alone.
MAX_TOKENS = 64
# A server may lie now and then. Who lies in one of three hand-overs is found with four pairs of
# trials, of two hand-overs each, in 96 % of cases.
TRIALS = 4
# By how much of their size the states of a trial are changed.
CHANGE = 0.02


@dataclass(frozen=True)
class Dispute:
    """What a server says it got is not what another says it has handed to it.

    Attributes:
        sender, receiver: with the blocks that they computed there; one begins where the other ends.
        states: ``[1, positions, hidden size]``, such as go into the sender's first block.
    """

    sender: RouteSegment
    receiver: RouteSegment
    states: torch.Tensor

    @classmethod
    def of(cls, history: History, sender: RouteSegment, receiver: RouteSegment) -> Dispute | None:
        """In the latest pass of a session; None if nobody knows what went into the sender."""
        known = [part.input_of(sender.start) for part in history.passes()]
        states = [one.detach().float().flatten(0, 1) for one in known if one is not None]
        if not states:
            return None
        return cls(sender, receiver, torch.cat(states)[None, -MAX_TOKENS:].clone())


@dataclass(frozen=True)
class Liar:
    """Who of a dispute lies.

    Attributes:
        by: who contradicts it.
    """

    segment: RouteSegment
    by: tuple[str, ...]


class Disputes:
    """Those that stayed open: who contradicts whom."""

    def __init__(self) -> None:
        self._others: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def add(self, dispute: Dispute) -> Liar | None:
        """Who is contradicted by two, each of whom nobody else contradicts."""
        both = dispute.sender, dispute.receiver
        for one, other in (both, both[::-1]):
            self._others[one.peer][other.peer] = other.span.name
        for one in both:
            others = self._others[one.peer]
            if len(others) > 1 and all(len(self._others[other]) == 1 for other in others):
                return Liar(one, tuple(others.values()))
        return None

    def forget(self, peer: str) -> None:
        """What a liar says counts against nobody."""
        for others in (self._others.pop(peer, {}), *self._others.values()):
            others.pop(peer, None)


async def who_lies(directory: Directory, dispute: Dispute, source: random.Random) -> Liar | None:
    """Try both with others, drawn at random; None if that does not tell."""
    sender, receiver = dispute.sender, dispute.receiver
    for _ in range(TRIALS):
        found = []
        for accused, other, pairs in (
            (sender, receiver, [(sender, one) for one in _instead(directory, receiver, sender)]),
            (receiver, sender, [(one, receiver) for one in _instead(directory, sender, receiver)]),
        ):
            pair = source.choice(pairs) if pairs else None
            if pair is not None and await agree(directory, pair, dispute.states, source) is False:
                third = pair[1] if accused is sender else pair[0]
                found.append(Liar(accused, (other.span.name, third.span.name)))
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _instead(
    directory: Directory, replaced: RouteSegment, other: RouteSegment
) -> Iterator[RouteSegment]:
    """Servers that can stand for one of a dispute, towards the other one."""
    sends = replaced.end == other.start
    for span in directory.usable():
        if span.peer in {replaced.peer, other.peer} or span.info.state != ServerState.ONLINE:
            continue
        end = replaced.end if sends else min(replaced.end, span.end)
        if not span.start <= replaced.start < end <= span.end or not span.prints:
            continue
        pair = (span, other.span) if sends else (other.span, span)
        if directory.together(*pair):
            yield RouteSegment(span, replaced.start, end)


async def agree(
    directory: Directory,
    pair: tuple[RouteSegment, RouteSegment],
    states: torch.Tensor,
    source: random.Random,
) -> bool | None:
    """Whether two servers say the same of what one hands to the other; None if nobody knows.

    Args:
        states: as in `Dispute`.
    """
    hops = [Hop(segment, directory, states.shape[1]) for segment in pair]
    order = source.sample(range(states.shape[1]), states.shape[1])
    changed = states[:, order]
    changed = changed + CHANGE * changed.std() * torch.randn_like(changed)
    stages = [
        Stage(hop, segment.start, segment.end) for hop, segment in zip(hops, pair, strict=True)
    ]
    stages[1].source = hops[0]
    length = changed.shape[1]
    try:
        for hop in hops:
            await hop.prepare(None)
        for begin, end in ((0, length - 1), (length - 1, length)):
            if begin < end:
                asked = [
                    Request(segment.start, segment.end, changed[:, begin:end], begin)
                    for segment in pair
                ]
                await run_pipeline(directory, stages, asked, lambda *_: None)
    except HandOverDisputed:
        return False
    except (HopLost, RemoteError) as error:
        logger.info("a trial of two servers came to nothing: %s", error)
        return None
    finally:
        for hop in hops:
            hop.close()
    # If it went over the notebook after all, neither has said anything of the other.
    return True if directory.together(pair[0].span, pair[1].span) else None
