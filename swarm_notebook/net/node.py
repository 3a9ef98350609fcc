"""A peer of the swarm: one p2pd daemon and one DHT node, living in the caller's asyncio loop.

hivemind's own `DHT` class forks the process to get its loop; `DHTNode` and `P2P` run as well in a
loop that is already there (contract C4). A notebook's node is a client: it stores nothing for
others and accepts no connections. A server's node does both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import psutil
from hivemind.dht.node import DHTID, DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils import get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from swarm_notebook.errors import ClocksDiffer, ConnectionFailed
from swarm_notebook.net import bootstrap
from swarm_notebook.net.addresses import LOOPBACK, addresses_of, parse_address, parse_peers
from swarm_notebook.net.dht.storage import MembersOnly, bound_storage, prefer_signed
from swarm_notebook.net.identity import Identity, identity_file
from swarm_notebook.net.membership.certificate import Credentials, Membership
from swarm_notebook.net.membership.invitation import Invitation, is_invitation
from swarm_notebook.net.membership.joining import join
from swarm_notebook.net.p2p import daemon
from swarm_notebook.net.p2p.fixes import (
    MAX_CLOCK_SECONDS,
    ReadableValues,
    allow_clocks,
    bound_nesting,
    know_all_identities,
    mend_calls,
)
from swarm_notebook.net.p2p.sockets import use_loop_writers
from swarm_notebook.net.wire import opening, streams
from swarm_notebook.net.wire.traffic import Traffic

bound_nesting()
allow_clocks()
know_all_identities()
prefer_signed()

logger: logging.Logger = logging.getLogger(__name__)

# hivemind's own 15 s are too few on slow networks and busy machines (seen in others' issues).
START_TIMEOUT = 30.0
# A dial over three round trips, the longest being 0.3 s, and time for a busy machine.
CONNECT_TIMEOUT = 5.0
PING_TIMEOUT = 3.0
# As many of a swarm as one is told of who joins it: p2pd is content with four that answer.
MAX_ADDRESSES = 8
# Weight of the latest ping: about the last five count.
PING_SMOOTHING = 0.3
_TIMES = re.compile(r"local: ([\d.]+), peer: ([\d.]+)")
# The largest answer that is read (`streams.MAX_FRAME_BYTES`); more where the machine has more.
LEAST_ANSWER_BYTES = 1 << 30


def smoothed_rtt(known: float | None, seconds: float) -> float:
    """A round trip after one more measurement of it, all in seconds."""
    if known is None:
        return seconds
    # The first call dials the peer: a lower later value is the truth, not noise.
    return min(seconds, known + PING_SMOOTHING * (seconds - known))


class Node:
    """P2P and DHT of one swarm. All methods belong to the loop that started it.

    Attributes:
        identity: the key behind the peer id, with which this peer's records are signed.
        membership: in a private swarm; None in a public one.
        answers: the memory for answers that arrive or wait to be unpacked, of all peers together.
    """

    p2p: P2P
    dht: DHTNode
    identity: Identity
    membership: Membership | None

    def __init__(
        self,
        p2p: P2P,
        dht: DHTNode,
        initial_peers: Sequence[Multiaddr],
        identity: Identity,
        *,
        membership: Membership | None = None,
        credentials: Credentials | None = None,
    ):
        self.p2p, self.dht, self.identity, self.membership = p2p, dht, identity, membership
        self._initial_peers = list(initial_peers)
        self._credentials, self._reviving = credentials, asyncio.Lock()
        self.answers: Traffic = Traffic(max(LEAST_ANSWER_BYTES, psutil.virtual_memory().total // 4))

    @classmethod
    async def start(
        cls,
        initial_peers: Sequence[str] = (),
        *,
        client: bool,
        host_maddrs: Sequence[str] = LOOPBACK,
        identity: Path | None = None,
        credentials: Credentials | None = None,
        patience: float = bootstrap.PATIENCE,
    ) -> Node:
        """Start a daemon, connect to the peers and join their DHT.

        Args:
            initial_peers: multiaddrs with peer ids, or an invitation to a private swarm; none
                begins a new swarm.
            client: only call others (a notebook), instead of being called as well (a server).
            host_maddrs: where a server listens.
            identity: file of the private key that makes the peer id permanent; made if missing.
            credentials: of a member of a private swarm; None asks for them if there is an
                invitation.
            patience: seconds within which peers are asked again that let this one in and say
                nothing, or do not redeem the invitation yet; each is asked once in any case.

        Raises:
            AddressError: an address is malformed, or the identity's file is unfit.
            ConnectionFailed: no initial peer could be reached, or it cannot reach this server.
            ClocksDiffer: this machine's clock and an initial peer's differ by more than a minute.
            NotAMember: this is to be a server, and the swarm is private.
            InvitationError: an invitation is no whole one, or is refused.
        """
        given = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
        invitations = [Invitation.read(peer) for peer in given if is_invitation(peer)]
        initial_peers = addresses_of(given)
        peers = parse_peers(initial_peers)
        for address in host_maddrs:
            parse_address("host_maddrs", address, "/ip4/<address>/tcp/<port>")
        deadline = time.monotonic() + patience
        try:
            with identity_file(identity) as (key, path, lasting):
                p2p = await bootstrap.start_daemon(
                    lambda: P2P.create(
                        initial_peers=[str(peer) for peer in peers] or None,
                        dht_mode="client" if client else "server",
                        host_maddrs=None if client else list(host_maddrs),
                        no_listen=client,
                        identity_path=str(path),
                        # A daemon is started for that; nobody else has an identity that is new, or
                        # a notebook's.
                        check_if_identity_free=lasting and not client,
                        startup_timeout=START_TIMEOUT,
                        use_relay=not client or bool(peers),
                        auto_nat=not client,
                        nat_port_map=False,
                    ),
                    deadline,
                )
        except P2PDaemonError as error:
            if not peers or "listen" in str(error):
                raise
            raise _unreachable(initial_peers, error) from None
        mend_calls(p2p)
        use_loop_writers(p2p)
        daemon.end_if_unheard(p2p)
        known = [PeerID.from_base58(peer["p2p"]) for peer in peers]
        try:
            if credentials is None and invitations:
                credentials = await join(p2p, invitations[0], deadline, known)
            membership = None if credentials is None else Membership(credentials, p2p.peer_id)
            dht = await DHTNode.create(
                p2p=p2p,
                # The same after a restart: a peer that others know under several ids would count
                # as several replicas of what it stores, and take them all along when it dies.
                node_id=DHTID.generate(p2p.peer_id.to_bytes()),
                client_mode=client,
                # hivemind would forget a silent peer for times that double without end.
                backoff_rate=1.0,
                # A notebook wants what the swarm says now, not what it said a minute ago.
                cache_locally=False,
                cache_on_store=False,
                cache_nearest=0,
                num_workers=8,
                record_validator=ReadableValues(),
                authorizer=None if membership is None else MembersOnly(membership),
            )
            if known and not await bootstrap.meet(dht, known, deadline):
                late = "a connection was made, but nothing said over it"
                raise _unreachable(initial_peers, TimeoutError(late))
        except ValidationError as error:
            await p2p.shutdown()
            raise _unfit(initial_peers, error) from None
        except BaseException:
            await p2p.shutdown()
            raise
        bound_storage(dht)
        return cls(p2p, dht, peers, key, membership=membership, credentials=credentials)

    @property
    def peer_id(self) -> PeerID:
        return self.p2p.peer_id

    async def addresses(self) -> list[str]:
        """The multiaddrs, with peer id, under which others reach this node."""
        return [str(maddr) for maddr in await self.p2p.get_visible_maddrs()]

    async def open_stream(
        self, peer: str, handler: str, meter: streams.ByteMeter | None = None
    ) -> streams.Stream:
        """A new stream to a handler of a peer (base58 id), see `opening.open_stream`.

        What is received is counted in `answers`, until its reader gives it back.
        """
        return await opening.open_stream(
            self.p2p,
            PeerID.from_base58(peer),
            handler,
            meter,
            account=self.answers.open(peer),
            membership=self.membership,
        )

    async def learn_revocations(self) -> None:
        """In a private swarm, read who is no member any more; what is open to them ends."""
        member = self.membership
        if member is None:
            return
        found = await self.dht.get(member.revocations_key, latest=True)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        for entry in entries.values():
            member.learn(entry.value)
        member.end_strangers()

    async def pass_on_revocations(self, seconds: float) -> None:
        """Store the newest list of those who are revoked, for others to read for so long."""
        member = self.membership
        if member is None or not member.revocations:
            return
        own = self.peer_id.to_base58()
        expires = get_dht_time() + seconds
        await self.dht.store(member.revocations_key, member.revocations, expires, subkey=own)

    async def ping(self, peer: str) -> float | None:
        """Seconds of a round trip to a peer (base58 id) of the DHT; None if it does not answer."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                answer = await self.dht.protocol.call_ping(PeerID.from_base58(peer))
        except streams.TRANSPORT_ERRORS as error:
            logger.debug("ping of %s: %s", peer, error)
            return None
        return None if answer is None else time.perf_counter() - began

    @property
    def in_touch(self) -> bool:
        """Whether any peer of the DHT has answered this one the last time it was asked."""
        return bool(self.dht.protocol.routing_table.uid_to_peer_id)

    def neighbours(self) -> list[str]:
        """Peers of the DHT (base58 ids) that this one knows; first those it was told to join."""
        initial = [maddr["p2p"] for maddr in self._initial_peers]
        met = [peer.to_base58() for peer in self.dht.protocol.routing_table.uid_to_peer_id.values()]
        own = self.peer_id.to_base58()
        return [peer for peer in dict.fromkeys([*initial, *met]) if peer != own]

    async def acquaintances(self) -> dict[str, list[str]]:
        """The multiaddrs of the peers that are known in the DHT, by their base58 ids.

        Those of who told them are without a peer id; a peer that is not connected has none.
        """
        met = set(self.dht.protocol.routing_table.uid_to_peer_id.values())
        connected = {peer.peer_id: peer.addrs for peer in await self.p2p.list_peers()}
        return {
            peer.to_base58(): [str(address) for address in connected.get(peer, ())]
            for peer in met
            if peer != self.peer_id
        }

    async def known_addresses(self) -> list[str]:
        """Multiaddrs with peer ids by which others of the DHT can be joined, of some of them."""
        known = [*(await self.acquaintances()).items()]
        some = random.sample(known, min(len(known), MAX_ADDRESSES))
        return [f"{address}/p2p/{peer}" for peer, addresses in some for address in addresses]

    async def meet(self, peer: str, addresses: Collection[str]) -> bool:
        """Let the DHT of a peer and this one's be one; whether it answers.

        Args:
            peer: its base58 id.
            addresses: multiaddrs at which it may be; without any, where it was last.
        """
        known = PeerID.from_base58(peer)
        # A ping makes each known to the other, and a search for oneself makes both known to those
        # who would be asked for the same keys.
        if not await self._dial(known, [Multiaddr(address) for address in addresses]):
            return False
        await self.dht.find_nearest_nodes([self.dht.node_id])
        return True

    async def redial(self, peers: Collection[str] = (), silent: Collection[str] = ()) -> None:
        """Connect again to peers that have gone away (and may have come back).

        Args:
            peers: ids of others than the initial peers, with whom there was a connection before.
            silent: ids of those that have just not answered over the connection that there is.
        """
        known = {PeerID.from_base58(maddr["p2p"]): [maddr] for maddr in self._initial_peers}
        known |= {peer: [] for peer in map(PeerID.from_base58, peers) if peer not in known}
        dials = (
            self._dial(peer, maddrs, silent=peer.to_base58() in silent)
            for peer, maddrs in known.items()
        )
        await asyncio.gather(*dials)

    async def _dial(
        self, peer: PeerID, maddrs: Sequence[Multiaddr], *, silent: bool = False
    ) -> bool:
        """Be connected with a peer; whether it answers."""
        try:
            if peer in {one.peer_id for one in await self.p2p.list_peers()}:
                if not silent and await self._answers(peer, PING_TIMEOUT):
                    return True
                # It may lead nowhere, from an address that this machine had in another network.
                # p2pd would keep it for as long as TCP does, and open no other one beside it.
                await self.p2p._client.disconnect(peer)
            if maddrs:
                # Here p2pd wants addresses without the peer's id, which comes apart.
                itself = Multiaddr(f"/p2p/{peer.to_base58()}")
                bare = [maddr.decapsulate(itself) for maddr in maddrs]
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await self.p2p._client.connect(peer, bare)
            return await self._answers(peer, CONNECT_TIMEOUT)
        except streams.TRANSPORT_ERRORS as error:
            logger.debug("peer %s does not answer: %s", peer, error)
        return False

    async def _answers(self, peer: PeerID, seconds: float) -> bool:
        with contextlib.suppress(*streams.TRANSPORT_ERRORS):
            async with asyncio.timeout(seconds):
                if await self.dht.protocol.call_ping(peer) is not None:
                    self.dht.blacklist.register_success(peer)
                    return True
        return False

    async def revive(self) -> None:
        """Where a notebook's daemon has ended, start another one, as the same peer.

        Raises: as `start`.
        """
        async with self._reviving:
            if daemon.lives(self.p2p):
                return
            logger.warning("the network daemon (p2pd) of this notebook has ended; starting anew")
            with tempfile.TemporaryDirectory() as folder:
                self.identity.write(Path(folder, "identity"))
                new = await Node.start(
                    [str(peer) for peer in self._initial_peers],
                    client=True,
                    identity=Path(folder, "identity"),
                    credentials=self._credentials,
                )
            p2p, dht, self.p2p, self.dht = self.p2p, self.dht, new.p2p, new.dht
            await dht.shutdown()
            await daemon.clear_up(p2p)

    async def stop(self) -> None:
        """Leave the DHT and end the daemon."""
        await self.dht.shutdown()
        await daemon.end(self.p2p)
        await opening.settle(self.p2p)


def _unreachable(initial_peers: Sequence[str], error: Exception) -> ConnectionFailed:
    listed = ", ".join(str(peer) for peer in initial_peers)
    if "is already taken" in str(error):
        return ConnectionFailed(
            "another server of this swarm has this one's identity; end that one, or give this one "
            f"a file of its own with --identity ({error})"
        )
    return ConnectionFailed(
        f"none of the initial peers answered: {listed}. Check that a server runs there "
        f"(swarm-notebook serve prints its address) and that its port is open ({error})"
    )


def _unfit(initial_peers: Sequence[str], error: ValidationError) -> ConnectionFailed:
    """What hivemind's check of the initial peers has found; it tells both clocks in its text."""
    times = _TIMES.search(str(error))
    if times is None:
        return _unreachable(initial_peers, error)
    ahead, why = float(times[1]) - float(times[2]), ", as records would seem expired"
    return ClocksDiffer.by(ahead, "an initial peer", MAX_CLOCK_SECONDS, why)
