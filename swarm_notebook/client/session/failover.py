"""Which server goes on when one fails in the middle of a step, and when none can.

A lost server's blocks become a gap of the chain, which the step fills with other servers. A server
that refuses is left out of the step, too, but is not avoided afterwards: it may be full, or right.
When all that are left would refuse as well, the step fails with what they say.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

from swarm_notebook.client.adapters import Adapter
from swarm_notebook.client.servers.routing import describe_blocks
from swarm_notebook.client.session.chain import Chain
from swarm_notebook.client.session.history import History
from swarm_notebook.client.session.hop import Hop
from swarm_notebook.client.session.pipeline import HandOverDisputed, HopLost
from swarm_notebook.client.telemetry import Failover, Timeline
from swarm_notebook.errors import (
    AdapterMissing,
    BadRequest,
    CacheFull,
    MissingBlocks,
    NotAMember,
    RemoteError,
    ServerBusy,
    SessionLost,
)

logger: logging.Logger = logging.getLogger(__name__)

# How often a server may be lost in one step if nobody else has its blocks: it may be restarted, but
# what fails on it again and again will not stop to.
MAX_LOSSES = 3


class FailoverPolicy:
    """Decides what follows from the failures of one step.

    Args:
        chain: the servers of the session.
        timeline: the generation that the step belongs to.
        adapter: what the blocks run with besides their own weights.

    Attributes:
        refusing: peers that have refused it.
    """

    def __init__(self, chain: Chain, timeline: Timeline, adapter: Adapter | None):
        self._chain, self._directory = chain, chain.directory
        self._timeline, self._adapter = timeline, adapter
        self._lost: Counter[str] = Counter()
        self.refusing: set[str] = set()

    def handle(self, loss: HopLost, history: History) -> None:
        """Go on without a failed hop, or without handing its input from server to server.

        Args:
            history: of the session.

        Raises:
            BadRequest, CacheFull, NotAMember, ServerBusy: no other server can mend it.
            MissingBlocks: the only server of some blocks fails again and again.
        """
        stage, error = loss.stage, loss.error
        if isinstance(loss, HandOverDisputed):
            self._part(loss, history)
            return
        if stage.source is not None and isinstance(error, BadRequest):
            # Perhaps its input was not what the client would have sent.
            before, after = stage.source.segment.peer, stage.hop.segment.peer
            self._directory.health.keep_apart(before, after)
            stage.hop.reset()
        elif not stage.hop.content_with_less(error):
            self._lose(stage.hop, error)

    def _part(self, dispute: HandOverDisputed, history: History) -> None:
        """Leave who has lied about a hand-over.

        If nobody knows who has, what one gives the other goes over the notebook from now on.
        """
        dispute.receiver.hop.reset()
        before, after = (
            replace(stage.hop.segment, start=stage.start, end=stage.end)
            for stage in (dispute.sender, dispute.receiver)
        )
        self._directory.health.keep_apart(before.peer, after.peer, float("inf"))
        liar, audits = dispute.liar, self._directory.audits
        if liar is None:
            said = f"{dispute}: one of them lies. From now on it goes over the notebook"
            logger.warning("%s", said)
            if audits is not None:
                audits.disputed(before, after, history, said)
            return
        segment = before if liar is dispute.sender else after
        said = f"{dispute}: by what was signed {liar.hop} lies"
        logger.warning("%s, and is never used again", said)
        self._directory.health.wrong[segment.peer] = said
        if liar is dispute.sender:
            # What it has told of this pass is not to be built upon.
            history.current.inputs.pop(liar.end, None)
            history.current.computed.pop(liar.end, None)
        if audits is not None:
            audits.convicted(segment, said)
        self._lose(liar.hop, dispute.error)

    def _lose(self, hop: Hop, error: RemoteError) -> None:
        self._chain.drop(hop)
        peer, lost = hop.segment.peer, replace(hop.segment, start=hop.start, end=hop.end)
        self._directory.telemetry.lost(self._timeline, Failover.of(lost, error))
        blocks = describe_blocks(range(hop.start, hop.end))
        if isinstance(error, (BadRequest, CacheFull, NotAMember, ServerBusy)):
            self._refuse(hop, error)
            logger.info("%s; trying %s on another server", error, blocks)
            return
        # A server may lose what it had, once; one that says so again and again is broken.
        forgiven = not self._lost[peer]
        self._lost[peer] += 1
        adapter = self._adapter
        if isinstance(error, AdapterMissing) and adapter is not None and forgiven:
            self._directory.uploaded.pop((peer, adapter.id), None)
        elif isinstance(error, SessionLost) and forgiven:
            logger.warning("%s; rebuilding the cache", error)
        else:
            self._directory.failed(peer, error)
            if self._lost[peer] > MAX_LOSSES and not self._others(hop):
                raise MissingBlocks(
                    f"no server holds {blocks} but one that fails again and again: {error}; start "
                    "another one, or ask whoever runs it to read its log"
                ) from None
            logger.warning("%s; continuing %s on another server", error, blocks)

    def _others(self, hop: Hop) -> bool:
        """Whether other servers have a hop's blocks."""
        exclude = {*self.refusing, hop.segment.peer}
        try:
            self._directory.chain(hop.start, hop.end, exclude)
        except MissingBlocks:
            return False
        return True

    def _refuse(self, hop: Hop, error: BadRequest | CacheFull | NotAMember | ServerBusy) -> None:
        """Leave a server that refused the step out of it; raise if the others would refuse too.

        One server that finds a request invalid may be wrong itself, two are believed.
        """
        believed = isinstance(error, BadRequest) and bool(self.refusing)
        self.refusing.add(hop.segment.peer)
        if believed or not self._others(hop):
            raise error
