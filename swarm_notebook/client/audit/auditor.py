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
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from swarm_notebook.client.audit import limits, piece
from swarm_notebook.client.audit.choice import PieceSampler
from swarm_notebook.client.audit.comparison import Errors, Result, errors_of
from swarm_notebook.client.audit.evidence import Evidence
from swarm_notebook.client.audit.interface import Outcomes
from swarm_notebook.client.audit.piece import Piece
from swarm_notebook.client.audit.verdicts import AGREED, HERE, OPEN, WRONG, Verdict, Verdicts
from swarm_notebook.client.passes.backward import PassGradients, backward_segment
from swarm_notebook.client.passes.call import server_name
from swarm_notebook.client.passes.forward import forward_segment
from swarm_notebook.client.request import Request
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.servers.routing import RouteSegment
from swarm_notebook.client.session.history import History
from swarm_notebook.client.telemetry import Failover
from swarm_notebook.errors import MissingBlocks, ModelNotFound, RemoteError, Unsupported
from swarm_notebook.net.dht.records import ServerState
from swarm_notebook.net.wire import tensors

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


@dataclass(frozen=True)
class _Replay:
    """What somebody else made of a piece's input: in float32, and in the server's own dtype."""

    by: tuple[str, ...]
    peers: frozenset[str]
    reference: Result
    twin: Result | None


class Auditor:
    """Audits the work of one model's servers; an `Audits` of the directory.

    Args:
        directory: who serves the model.
        rate: how much is computed for audits, as a share of what is computed anyway.
        judge: computes here what is disputed, if the user allows it.

    Attributes:
        verdicts: what was found.
        positions: fewer answers of a pass are not compared.
    """

    positions = limits.MIN_TOKENS

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
        self.verdicts: Verdicts = Verdicts()

    def step(self, history: History) -> None:
        """A step of a session has come back."""
        current = history.current
        for end, computed in list(current.computed.items()):
            segment = replace(computed.segment, start=computed.start, end=end)
            rows = next(iter(current.edits.values())).shape[0]
            tokens = rows * current.end
            if tokens >= limits.MIN_TOKENS and self._drawn(segment, rows * current.length, tokens):
                compression = self._directory.compression_for(segment.span)
                self._take(piece.of_session(history, computed, end, compression))

    def forwarded(
        self, segment: RouteSegment, request: Request, answer: torch.Tensor, kept: bool
    ) -> None:
        """A server has answered its part of a forward pass without a cache."""
        tokens = answer.shape[0] * answer.shape[1]
        if tokens >= limits.MIN_TOKENS and self._drawn(segment, tokens, tokens):
            compression = self._directory.compression_for(segment.span)
            found = piece.of_pass(segment, request, answer, compression, kept=kept)
            if found is not None and found.request.prompts is not None:
                # They may be trained before the audit.
                found.request.prompts = found.request.prompts.clone()
            self._take(found)

    def went_back(
        self, segment: RouteSegment, request: Request, grad: torch.Tensor, found: PassGradients
    ) -> None:
        """A server has answered its part of a backward pass."""
        tokens = grad.shape[0] * grad.shape[1]
        if tokens >= limits.MIN_TOKENS and self._drawn(segment, tokens, tokens, back=True):
            self._take(piece.of_backward(segment, request, grad, found))

    def disputed(self, sender: RouteSegment, receiver: RouteSegment, why: str) -> None:
        """What one server says it has handed to another is not what that one says it got.

        Both count as new again: who lies is found by the next answers, whose input is known.
        """
        for one in (sender, receiver):
            self._tried.discard((one.peer, False))
            self.verdicts.add(
                Verdict(one.peer, one.span.name, one.start, one.end, 0, OPEN, why=why)
            )

    def _drawn(self, segment: RouteSegment, tokens: int, total: int, *, back: bool = False) -> bool:
        blocks, dtype = segment.end - segment.start, piece.dtype_of(segment)
        if dtype is None or segment.peer in self._directory.health.wrong:
            return False
        replays = 1 if dtype == torch.float32 else 2
        stranger = (segment.peer, back) not in self._tried
        done, cost = tokens * blocks, total * blocks * replays
        return self._choice.draw(tokens, done, cost, stranger=stranger)

    def _take(self, found: Piece | None) -> None:
        if found is None or found.tokens < limits.MIN_TOKENS or len(self._waiting) >= MAX_WAITING:
            return
        self._tried.add((found.segment.peer, found.grad is not None))
        self._waiting.append(found)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._waiting:
            try:
                verdict = await self.audit(self._waiting[0])
                self.verdicts.add(verdict)
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
            return _verdict(found, OPEN, why="no other server has these blocks and can replay them")
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
                second = await self._replay(found, {segment.peer, *first.peers})
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

    async def _first_replay(self, found: Piece) -> _Replay | None:
        """By a witness, by preference one who has not said all it can; here where there is none."""
        peer = found.segment.peer
        doubters = self._evidence.doubters(peer)
        first = await self._replay(found, {peer, *doubters})
        if first is None and doubters and self._judge is None:
            first = await self._replay(found, {peer})
        return first or await self._at_home(found)

    def _added_up(self, found: Piece, replay: _Replay, errors: Errors) -> Verdict:
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

    def _condemn_witness(self, found: Piece, first: _Replay, second: _Replay) -> None:
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

    async def _compare(self, found: Piece, other: _Replay) -> tuple[Errors, str]:
        answer: Result = found.gradients or found.answer
        states, weights = await asyncio.to_thread(
            errors_of, answer, other.reference, other.twin, found.counted
        )
        return limits.judged(states, weights, found.rounded, back=found.grad is not None)

    async def _differ(self, found: Piece, first: _Replay, second: _Replay) -> bool:
        """Whether two replays in float32 are not the same either."""
        states, weights = await asyncio.to_thread(
            errors_of, first.reference, second.reference, None, found.counted
        )
        # Each may have weights of its own dtype: then they differ by less than that rounds.
        most = limits.MAX_ERROR[torch.bfloat16] * limits.MAX_TOKEN
        return max(states.mean, weights.mean) > most

    async def _at_home(self, found: Piece) -> _Replay | None:
        if self._judge is None:
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
        return _Replay((HERE,), frozenset(), reference, twin)

    async def _replay(self, found: Piece, exclude: Collection[str]) -> _Replay | None:
        """What another server, drawn at random, or a chain of them, makes of the input."""
        excluded = set(exclude)
        while True:
            chain = self._witnesses(found, excluded)
            if chain is None:
                return None
            dtype = piece.dtype_of(found.segment)
            try:
                reference = await self._run(found, chain, torch.float32)
                half = dtype not in (None, torch.float32)
                twin = await self._run(found, chain, dtype) if half and dtype else None
            except RemoteError as error:
                logger.info("an audit goes elsewhere: %s", error)
                excluded |= {part.peer for part in chain}
                continue
            names = tuple(part.span.name for part in chain)
            return _Replay(names, frozenset(part.peer for part in chain), reference, twin)

    def _witnesses(self, found: Piece, exclude: set[str]) -> list[RouteSegment] | None:
        """Servers to replay a piece: one that has all its blocks, or else the best chain."""
        start, end, dtype = found.segment.start, found.segment.end, piece.dtype_of(found.segment)

        def able(segment: RouteSegment) -> bool:
            theirs = piece.dtype_of(segment)
            # Weights that were rounded to a half cannot say what others give.
            exact = theirs in (torch.float32, dtype)
            return segment.span.casts and exact and segment.peer not in exclude

        online = [
            RouteSegment(span, start, end)
            for span in self._directory.usable()
            if span.info.state == ServerState.ONLINE and span.start <= start and end <= span.end
        ]
        single = [segment for segment in online if able(segment)]
        if single:
            return [self._source.choice(single)]
        unable = {
            span.peer
            for span in self._directory.snapshot.spans
            if not able(RouteSegment(span, span.start, span.end))
        }
        try:
            return self._directory.chain(start, end, unable)
        except MissingBlocks:
            return None

    async def _run(self, found: Piece, chain: Sequence[RouteSegment], dtype: torch.dtype) -> Result:
        request = replace(found.request, dtype=tensors.dtype_name(dtype))
        if request.adapter is not None:
            # Not the one in use, of which a server keeps one state: this may be an older one.
            request.adapter = replace(request.adapter, id=f"audit-{request.adapter.id}")
        hidden, parts = request.hidden, []
        for segment in chain:
            parts.append(request.part(segment.start, segment.end, hidden))
            if found.grad is None or segment is not chain[-1]:
                outputs = await forward_segment(self._directory, segment, parts[-1])
                hidden = outputs.states[segment.end - 1]
        if found.grad is None:
            return hidden
        gathered = PassGradients(found.grad)
        for segment, part in zip(reversed(chain), reversed(parts), strict=True):
            got = await backward_segment(self._directory, segment, part, gathered.input)
            gathered.input = got.input
            gathered.prompts.update(got.prompts)
            gathered.weights.update(got.weights)
        return gathered


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
