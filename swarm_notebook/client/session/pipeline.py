"""One step through a chain of servers, each of which hands its output to the next.

A chain is a list of `Stage`s: runs of blocks on one server each. Where two servers can reach each
other, the hidden states go straight from one to the next (see `server.rpc.push`), and every server
answers to the client besides; where they cannot, or where a hook decides the input, the client
sends them. A push that fails, or is late, is made good by the client, under the same step id, so
that it does not matter which of the two comes first.

Several steps may be under way at once, one behind the other: each hop sends and answers them in
their order. So the parts of a long prompt keep all servers of a chain busy.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swarm_notebook.client.request import Outputs, Request, ServerReport
from swarm_notebook.client.servers.directory import Directory
from swarm_notebook.client.session.history import Pass
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.writer import StepRoute, new_step_id
from swarm_notebook.client.telemetry import HopTimes
from swarm_notebook.errors import RemoteError, ServerFailed
from swarm_notebook.net.dht.records import ServerSpan
from swarm_notebook.net.wire.hand_overs import PushedStep

logger: logging.Logger = logging.getLogger(__name__)

# p parts keep s servers busy for the time of p + s - 1 of them: at 16 parts, four servers take a
# fifth longer than they would at best, and each part more costs a message per server.
MAX_PARTS = 16
# One server is sent parts only so that they are computed while others travel. This many leave a
# quarter of the way that nothing hides; parts of fewer tokens travel in 10 ms (20 microseconds for
# a position of 8 KB on loopback), which is not worth them.
MAX_PARTS_ALONE, ALONE_TOKENS = 4, 512
# How many times longer than a single token a part should take (less is overhead), of servers that
# do not say from how many tokens on it is.
PART_STEPS = 4
# For servers that announce no speed, and bounds for announcements that make no sense.
PART_TOKENS, MIN_PART_TOKENS, MAX_PART_TOKENS = 128, 64, 4096


@dataclass(slots=True)
class Stage:
    """Blocks ``[start, end)`` on the server of a hop.

    Attributes:
        given: a hook has decided the input, instead of the stage before.
        source: the hop whose server hands over the input; None: the client sends it.
    """

    hop: Hop
    start: int
    end: int
    given: bool = False
    source: Hop | None = None


class HopLost(Exception):
    """A hop failed; `error` says how."""

    stage: Stage
    error: RemoteError

    def __init__(self, stage: Stage, error: RemoteError):
        super().__init__(str(error))
        self.stage, self.error = stage, error


class HandOverDisputed(HopLost):
    """What a server says was pushed to it is not what the server before says it has pushed.

    What came of it is not used. One of both lies: by what the sender has signed the notebook knows
    who (`hand_overs`), unless the receiver is gone and shows nothing.

    Attributes:
        sender, receiver: the two stages.
        liar: which of them.
    """

    def __init__(self, sender: Stage, receiver: Stage, liar: Stage | None, error: RemoteError):
        super().__init__(liar or receiver, error)
        self.sender, self.receiver, self.liar = sender, receiver, liar


async def run_pipeline(
    directory: Directory,
    stages: Sequence[Stage],
    requests: Sequence[Request],
    deliver: Callable[[int, Outputs, HopTimes], None],
) -> None:
    """Run a step through the stages of a chain, whose hops are prepared.

    Args:
        directory: keeps in mind which servers cannot reach each other.
        stages: the chain.
        requests: one for each stage. Those of the first and of given ones have their hidden
            states, the others something of the same shape.
        deliver: gets the number of a stage, its outputs and times, as they come.

    Raises:
        HopLost: a stage failed; all before it are done.
    """
    first = 0
    while first < len(stages):
        last = first + 1
        while last < len(stages) and stages[last].source is not None:
            last += 1
        group = _PushGroup(directory, stages[first:last], requests[first:last])
        outputs = await group.run(first, deliver)
        if last < len(stages) and not stages[last].given:
            requests[last].hidden = outputs.states[stages[last].start - 1]
        first = last


class _PushGroup:
    """Stages of which each hands its output to the next."""

    def __init__(
        self,
        directory: Directory,
        stages: Sequence[Stage],
        requests: Sequence[Request],
    ):
        self._directory = directory
        self._resent: set[int] = set()
        # Not that of the group before: its last server may be this one's first, and takes a step
        # that comes twice for one.
        step_id = new_step_id()
        self._stages, self._requests = stages, requests
        hops = [stage.hop for stage in stages]
        self._routes = [
            StepRoute(
                step_id,
                push_from=hops[number - 1].segment.peer if number else None,
                push_to=(hops[number + 1].segment.peer, hops[number + 1].session_id)
                if number + 1 < len(hops)
                else None,
            )
            for number in range(len(hops))
        ]

    async def run(self, number: int, deliver: Callable[[int, Outputs, HopTimes], None]) -> Outputs:
        """Send to all, then receive from all in order; the outputs of the last one."""
        began = time.perf_counter()
        packed, unsent = await self._send()
        outputs = Outputs({}, {})
        handed: tuple[int | None, bytes] = None, b""
        for index, stage in enumerate(self._stages):
            if unsent is not None and unsent.stage is stage:
                raise unsent
            hop, request = stage.hop, self._requests[index]
            last = index + 1 == len(self._stages)
            try:
                async with hop.receiving:
                    nudge = self._nudge(index) if index else None
                    seed = None if last else self._stages[index + 1].hop.print_seed
                    answer = await hop.receive(request, nudge, seed)
                    await self._compare(index, *handed, answer.report)
            except RemoteError as error:
                raise HopLost(stage, error) from None
            outputs, handed = answer.outputs, (answer.print, answer.digest)
            times = answer.times(hop.segment, request, began, packed, awaited=last)
            deliver(number + index, outputs, times)
            # What the next server took is counted from here: it began when this one answered.
            began = packed = answer.received
            if answer.report.filled and index:
                self._keep_apart(index)
            if not last:
                self._requests[index + 1].hidden = outputs.states[stage.end - 1]
                if answer.report.push_failed:
                    self._keep_apart(index + 1)
                    if unsent is None or unsent.stage is not self._stages[index + 1]:
                        await self._resend(index + 1)
        return outputs

    async def _compare(
        self, index: int, handed: int | None, digest: bytes, report: ServerReport
    ) -> None:
        """See to it that a stage got what the one before says it has pushed.

        Args:
            handed, digest: print and digest of the latter; None: there is none.
            report: of the stage.
        """
        same = handed is None or report.print == handed
        if same or (report.filled and index in self._resent):
            return
        before, stage = self._stages[index - 1], self._stages[index]
        liar = await self._liar(index, digest)
        # Answers to what follows are of no use, and nobody is to take one for another.
        stage.hop.close()
        said = "does not say what came from it" if report.print is None else "says something else"
        error = ServerFailed(f"{before.hop} says what it has handed to {stage.hop}, which {said}")
        raise HandOverDisputed(before, stage, liar, error)

    async def _liar(self, index: int, digest: bytes) -> Stage | None:
        """Whose word is not what was signed: of a stage or of the one before; None: not known."""
        before, stage = self._stages[index - 1], self._stages[index]
        step_id = self._routes[index].step_id
        try:
            signed = await stage.hop.proof(self._requests[index], step_id)
        except RemoteError as error:
            logger.info("%s shows nothing of what was handed to it: %s", stage.hop, error)
            return None
        asked = PushedStep(self._directory.own_peer, stage.hop.session_id, step_id)
        # It takes nothing that is not signed, so it has something to show.
        given = signed if signed and signed.is_by(before.hop.segment.peer, asked) else None
        return before if given is not None and given.digest != digest else stage

    async def _send(self) -> tuple[float, HopLost | None]:
        """Send to all in order; when the first was packed, and the stage at which that failed."""
        packed = 0.0
        for stage, request, route in zip(self._stages, self._requests, self._routes, strict=True):
            try:
                async with stage.hop.sending:
                    moment = await stage.hop.send(request, route)
            except RemoteError as error:
                return packed, HopLost(stage, error)
            packed = packed or moment
        return packed, None

    def _nudge(self, index: int) -> Callable:
        async def nudge() -> None:
            self._resent.add(index)
            async with self._stages[index].hop.sending:
                await self._stages[index].hop.resend(self._requests[index], self._routes[index])

        return nudge

    async def _resend(self, index: int) -> None:
        try:
            await self._nudge(index)()
        except RemoteError as error:
            raise HopLost(self._stages[index], error) from None

    def _keep_apart(self, index: int) -> None:
        before, after = self._stages[index - 1].hop.segment, self._stages[index].hop.segment
        self._directory.health.keep_apart(before.peer, after.peer)


def part_count(length: int, batch: int, servers: Sequence[ServerSpan]) -> int:
    """In how many parts a pass of ``length`` tokens goes through these servers."""
    size = max(part_tokens(span) for span in servers)
    most = MAX_PARTS
    if len(servers) < 2:
        size, most = max(size, ALONE_TOKENS), MAX_PARTS_ALONE if servers[0].info.part_tokens else 1
    return max(min(most, length * batch // size, length), 1)


def split(whole: Pass, stages: Sequence[Stage], *, divisible: bool) -> list[Pass]:
    """The parts in which a pass is sent: itself, or if it is long several, in their order."""
    batch = next(iter(whole.edits.values())).shape[0]
    spans = {id(stage.hop): stage.hop.segment.span for stage in stages}
    count = part_count(whole.length, batch, list(spans.values()))
    if count == 1 or not divisible:
        return [whole]
    bounds = [whole.position + whole.length * number // count for number in range(count + 1)]
    return [whole.tokens(low, high) for low, high in itertools.pairwise(bounds) if low < high]


def part_tokens(span: ServerSpan) -> int:
    """From how many tokens on a server computes about as fast as it ever does."""
    if span.info.part_tokens is not None:
        return min(max(span.info.part_tokens, MIN_PART_TOKENS), MAX_PART_TOKENS)
    single, many = span.info.inference_rps, span.info.forward_rps
    if not single or not many:
        return PART_TOKENS
    return int(min(max(PART_STEPS * many / single, MIN_PART_TOKENS), MAX_PART_TOKENS))
