"""Replays finished work elsewhere, in the background, and leaves servers that answered wrong.

Nothing waits for an audit: session and passes hand over what they have finished, `PieceSampler`
draws some of it, and one task of the network thread works it off. The *witness* that replays is
drawn among the other servers of the same blocks, so that two friends cannot count on vouching for
each other. When it disagrees, a second one decides, or the notebook itself where its user allows
that; then the notebook also computes some of what a witness has agreed with.

The server in question is never asked again. So it cannot tell audited work from other work; it can
only be right or wrong when it answers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace

import torch

from swarm_notebook.client.audit import limits, piece
from swarm_notebook.client.audit.choice import PieceSampler, share_asked
from swarm_notebook.client.audit.comparison import Errors, Result, errors_of
from swarm_notebook.client.audit.evidence import Evidence
from swarm_notebook.client.audit.interface import Outcomes
from swarm_notebook.client.audit.piece import Piece
from swarm_notebook.client.audit.verdicts import AGREED, OPEN, SIGNED, WRONG, Verdict, Verdicts
from swarm_notebook.client.audit.witnesses import Replay, Witnesses
from swarm_notebook.client.passes.backward import PassGradients
from swarm_notebook.client.passes.call import server_name
from swarm_notebook.client.request import Request
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.history import History
from swarm_notebook.client.telemetry import Failover
from swarm_notebook.errors import ModelNotFound, Unsupported
from swarm_notebook.texts import HERE

logger: logging.Logger = logging.getLogger(__name__)

# Pieces that wait; each holds its input and answer. More than a few wait only where witnesses are
# slower than the work itself: then the newest are not audited.
MAX_WAITING = 8

# Of answers that a witness agrees with, how many are computed here as well, where the user allows
# it: two servers that vouch for each other are found within eight audits on average, for an eighth
# of what audits cost, on this machine.
HOME_SHARE = 1 / 8

Judge = Callable[[Request, torch.dtype, torch.Tensor | None], Result]
"""Computes a request in the notebook, in a dtype; with the gradient of its output, the way back.
Called in a thread of its own."""


class Auditor:
    """Audits the work of one model's servers; an `Audits` of the directory.

    Args:
        directory: who serves the model.
        rate: how much is computed for audits, as a share of what is computed anyway.
        judge: computes here what is disputed, if the user allows it.

    Attributes:
        verdicts: what was found.
    """

    rate: float

    def __init__(self, directory: Directory, rate: float, judge: Judge | None = None):
        self._directory, self._judge, self.rate = directory, judge, rate
        self._source = random.SystemRandom()  # nobody can predict it
        self._choice = PieceSampler(rate, self._source)
        # By peer, and whether it was a way back: who is new to gradients may lie in them alone.
        self._tried: set[tuple[str, bool]] = set()
        self._waiting: list[Piece] = []
        self._working: asyncio.Task | None = None
        self._evidence = Evidence()
        self._witnesses = Witnesses(directory, self._source)
        self.verdicts: Verdicts = Verdicts()

    def more_asked(
        self, segment: RouteSegment, rows: int, length: int, states: int
    ) -> tuple[int, float]:
        """Of how many of a prompt's last positions to ask for the answers, and how often."""
        more = -(-limits.MIN_TOKENS // rows)
        if more > length:
            return 1, 1.0
        if (segment.peer, False) not in self._tried:
            return more, 1.0
        return more, share_asked(states, more - 1)

    def draw_asked(self, share: float) -> bool:
        """Whether this prompt is among so many of them."""
        return self._source.random() < share

    def step(self, history: History) -> None:
        """A step of a session has come back."""
        current = history.current
        rows, travelled = current.rows, piece.travelled(current, self._directory.together)
        for end, computed in list(current.computed.items()):
            segment = replace(computed.segment, start=computed.start, end=end)
            tokens = rows * current.end
            of_step = rows * current.length
            cost = self._drawn(segment, of_step, tokens, travelled=travelled, asked=computed.asked)
            if cost:
                compression = self._directory.compression_for(segment.span)
                self._take(piece.of_session(history, computed, end, compression), cost)

    def forwarded(
        self, segment: RouteSegment, request: Request, answer: torch.Tensor, kept: bool
    ) -> None:
        """A server has answered its part of a forward pass without a cache."""
        tokens = answer.shape[0] * answer.shape[1]
        cost = self._drawn(segment, tokens, tokens)
        if cost:
            compression = self._directory.compression_for(segment.span)
            found = piece.of_pass(segment, request, answer, compression, kept=kept)
            if found is not None and found.request.prompts is not None:
                # They may be trained before the audit.
                found.request.prompts = found.request.prompts.clone()
            self._take(found, cost)

    def went_back(
        self, segment: RouteSegment, request: Request, grad: torch.Tensor, found: PassGradients
    ) -> None:
        """A server has answered its part of a backward pass."""
        tokens = grad.shape[0] * grad.shape[1]
        cost = self._drawn(segment, tokens, tokens, back=True)
        if cost:
            self._take(piece.of_backward(segment, request, grad, found), cost)

    def disputed(
        self, sender: RouteSegment, receiver: RouteSegment, history: History, why: str
    ) -> None:
        """What one server says it has handed to another is not what that one says it got.

        What the sender has answered is audited, and both count as new again: what they answer next
        is audited, and its input is known.
        """
        for one in (sender, receiver):
            self._tried.discard((one.peer, False))
            self.verdicts.add(
                Verdict(one.peer, one.span.name, one.start, one.end, 0, OPEN, why=why)
            )
        computed = history.current.computed.get(sender.end)
        if computed is not None and computed.segment.peer == sender.peer:
            compression = self._directory.compression_for(sender.span)
            self._take(piece.of_session(history, computed, sender.end, compression))

    def convicted(self, liar: RouteSegment, why: str) -> None:
        """A server has lied about a hand-over, and signatures say so."""
        self.verdicts.add(
            Verdict(liar.peer, liar.span.name, liar.start, liar.end, 0, WRONG, (SIGNED,), why)
        )

    def _drawn(
        self,
        segment: RouteSegment,
        tokens: int,
        total: int,
        *,
        travelled: float = 1.0,
        asked: float = 1.0,
        back: bool = False,
    ) -> int:
        """What an audit of a piece costs, if it is to be; else 0.

        Args:
            tokens, total: of the piece, and of what is replayed for it.
            travelled: of the states that a replay as long would send, how many have.
            asked: as in `PieceSampler.draw`.
        """
        blocks, dtype = segment.end - segment.start, piece.dtype_of(segment)
        if segment.peer in self._directory.health.wrong:
            return 0
        if dtype is None:
            self._leave_open(segment)
            return 0
        replays = 1 if dtype == torch.float32 else 2
        stranger = (segment.peer, back) not in self._tried
        done, cost = tokens * blocks * travelled, total * blocks * replays
        if total < limits.MIN_TOKENS:
            self._choice.skip(done)
            return 0
        drawn = self._choice.draw(tokens, done, cost, stranger=stranger, asked=asked)
        return cost if drawn else 0

    def _leave_open(self, segment: RouteSegment) -> None:
        """Say once of a server that it is not audited."""
        if (segment.peer, False) in self._tried:
            return
        self._tried.add((segment.peer, False))
        span = segment.span
        why = "it does not say which values its weights have, so nobody can tell what they give"
        self.verdicts.add(
            Verdict(segment.peer, span.name, segment.start, segment.end, 0, OPEN, why=why)
        )

    def _take(self, found: Piece | None, cost: int = 0) -> None:
        if found is not None and found.tokens >= limits.MIN_TOKENS and self._wait_for(found):
            self._tried.add((found.segment.peer, found.grad is not None))
        else:
            self._choice.give_back(cost)

    def _wait_for(self, found: Piece) -> bool:
        if len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append(found)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return True

    async def _work(self) -> None:
        while self._waiting:
            found = self._waiting[0]
            try:
                self.verdicts.add(await self.audit(found))
            except Exception:
                logger.exception("an audit failed")
            finally:
                self._waiting.pop(0)

    def outcomes(self, peer: str) -> Outcomes:
        """What audits of a server have found so far."""
        return self.verdicts.outcomes(peer)

    async def settled(self) -> None:
        """Wait for the audits that are under way."""
        while self._working is not None and not self._working.done():
            await asyncio.wait([self._working])

    def stop(self) -> None:
        """Give up what is under way."""
        if self._working is not None:
            self._working.cancel()

    async def audit(self, found: Piece) -> Verdict:
        """Replay a piece, and decide; a server whose answer is wrong is left."""
        segment, first = found.segment, await self._first_replay(found)
        if first is None:
            packed = "" if piece.of_checkpoint(segment) else ", packed to the same bits,"
            why = f"no other server has these blocks{packed} and can replay them"
            return _verdict(found, OPEN, why=why)
        errors, why = await self._compare(found, first)
        if not why and first.peers and self._source.random() < HOME_SHARE:
            first = await self._at_home(found) or first
            errors, why = await self._compare(found, first)
        if not why:
            return self._added_up(found, first, errors)
        second = None
        if first.peers:
            second = await self._at_home(found)
            if second is None:
                second = await self._witnesses.replay(found, {segment.peer, *first.peers})
            if second is None:
                said = f"{', '.join(first.by)} disagrees, and nobody else can decide: {why}"
                logger.warning("audit of %s: %s", server_name(segment), said)
                return _verdict(found, OPEN, by=first.by, why=said, errors=errors)
            errors, again = await self._compare(found, second)
            if not again:
                self._condemn_witness(found, first, second)
                return _verdict(found, AGREED, by=second.by, errors=errors)
            if await self._differ(found, first, second):
                said = f"{', '.join((*first.by, *second.by))} and this server all disagree"
                return _verdict(found, OPEN, by=(*first.by, *second.by), why=said, errors=errors)
            why = again
        by = (*first.by, *(second.by if second else ()))
        return self._wrong(found, by, why, errors)

    async def _first_replay(self, found: Piece) -> Replay | None:
        """By a witness, by preference one who has not said all it can; here where there is none."""
        peer = found.segment.peer
        doubters = self._evidence.doubters(peer)
        first = await self._witnesses.replay(found, {peer, *doubters})
        if first is None and doubters and self._judge is None:
            first = await self._witnesses.replay(found, {peer})
        return first or await self._at_home(found)

    def _added_up(self, found: Piece, replay: Replay, errors: Errors) -> Verdict:
        """Nothing is wrong with this answer by itself; is there with the latest together?

        Gradients are not added up: what halves make of them does not average out.
        """
        segment = found.segment
        if found.grad is not None:
            return _verdict(found, AGREED, by=replay.by, errors=errors)
        why = self._evidence.add(segment.peer, replay.peers, errors)
        if not why:
            return _verdict(found, AGREED, by=replay.by, errors=errors)
        if self._evidence.counts(segment.peer):
            self._evidence.forget(segment.peer)
            return self._wrong(found, replay.by, why, errors, proves=False)
        said = f"{', '.join(replay.by)} disagrees, and others are asked from now on: {why}"
        logger.warning("audits of %s: %s", server_name(segment), said)
        return _verdict(found, OPEN, by=replay.by, why=said, errors=errors)

    def _wrong(
        self, found: Piece, by: tuple[str, ...], why: str, errors: Errors, *, proves: bool = True
    ) -> Verdict:
        """The answer does not follow from the input that the notebook knows of.

        Args:
            proves: this piece shows it by itself.
        """
        self._condemn(found.segment, f"by {', '.join(by)}: {why}")
        proof = found if proves else None
        return _verdict(found, WRONG, by=by, why=why, errors=errors, proof=proof)

    def _condemn(self, segment: RouteSegment, reason: str) -> None:
        self._directory.health.wrong[segment.peer] = reason
        said, telemetry = f"found wrong {reason}", self._directory.telemetry
        logger.warning("%s is never used again: %s", server_name(segment), said)
        telemetry.lost(telemetry.latest, Failover.of(segment, said))

    def _condemn_witness(self, found: Piece, first: Replay, second: Replay) -> None:
        """The server was right, and so whoever spoke against it is not."""
        if len(first.peers) != 1:
            return
        (peer,) = first.peers
        for span in self._directory.snapshot.spans:
            if span.peer == peer and span.start <= found.segment.start < span.end:
                segment = RouteSegment(span, found.segment.start, found.segment.end)
                why = f"as a witness, contradicted by {found.segment.span.name} and {second.by[0]}"
                self._condemn(segment, why)
                verdict = _verdict(found, WRONG, by=second.by, why=why)
                self.verdicts.add(replace(verdict, peer=peer, name=span.name))
                return

    async def _compare(self, found: Piece, other: Replay) -> tuple[Errors, str]:
        answer: Result = found.gradients or found.answer
        states, weights = await asyncio.to_thread(
            errors_of, answer, other.reference, other.twin, found.counted
        )
        return limits.judged(states, weights, found.rounded, back=found.grad is not None)

    async def _differ(self, found: Piece, first: Replay, second: Replay) -> bool:
        """Whether two replays in float32 are not the same either."""
        states, weights = await asyncio.to_thread(
            errors_of, first.reference, second.reference, None, found.counted
        )
        # Each may have weights of its own dtype: then they differ by less than that rounds.
        most = limits.MAX_ERROR[torch.bfloat16] * limits.MAX_TOKEN
        return max(states.mean, weights.mean) > most

    async def _at_home(self, found: Piece) -> Replay | None:
        if self._judge is None or not piece.of_checkpoint(found.segment):
            return None
        dtype, twin = piece.dtype_of(found.segment), None
        try:
            request, grad = found.request, found.grad
            reference = await asyncio.to_thread(self._judge, request, torch.float32, grad)
            if dtype is not None and dtype != torch.float32:
                twin = await asyncio.to_thread(self._judge, request, dtype, grad)
        except (Unsupported, ModelNotFound) as error:
            logger.info("an audit cannot be decided here: %s", error)
            return None
        return Replay((HERE,), frozenset(), reference, twin)


def _verdict(
    found: Piece,
    outcome: str,
    *,
    by: tuple[str, ...] = (),
    why: str = "",
    errors: Errors | None = None,
    proof: Piece | None = None,
) -> Verdict:
    segment = found.segment
    return Verdict(
        segment.peer,
        segment.span.name,
        segment.start,
        segment.end,
        found.tokens,
        outcome,
        by,
        why,
        errors,
        proof=proof,
        back=found.grad is not None,
        made=found.when,
    )
