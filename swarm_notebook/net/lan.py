"""Swarms of the local network, found without an address: by multicast DNS (RFC 6762, RFC 6763).

A server that is started with ``--lan`` answers whoever asks the network for `SERVICE`: with its
port and addresses, its peer id, and what it serves. Of a private swarm that is a fingerprint of the
swarm's key alone, which tells something only to who has an invitation.

Anybody on the network may answer with anything. So what is found here is an address and no more, as
if somebody had read it out: whatever is then said there is checked as at any other address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm_notebook.errors import AddressError, ConnectionFailed, ModelNotServed, Unsupported
from swarm_notebook.net.addresses import parse_peers
from swarm_notebook.net.membership.invitation import Invitation, is_invitation
from swarm_notebook.texts import clean

if TYPE_CHECKING:
    from zeroconf.asyncio import AsyncZeroconf

logger: logging.Logger = logging.getLogger(__name__)

SERVICE = "_swarm-notebook._tcp.local."
# Whoever has the name answers within 0.12 s (RFC 6762, 6); a question that was lost is asked again
# after a second. After the first answer, so long for those of others.
LOOK_SECONDS, MORE_SECONDS = 3.0, 0.5
# More servers than a network of this kind has; each is asked for its details.
MAX_SERVERS = 64
MAX_NAME = 200  # bytes of a model's name: a text of a record has 255 with its key
FINGERPRINT_BYTES = 8


@dataclass(frozen=True)
class Found:
    """A server of the local network, as it says itself.

    Attributes:
        addresses: multiaddrs with its peer id.
        model: the prefix of the model's keys in the DHT; empty in a private swarm.
        swarm: `fingerprint` of a private swarm; empty in a public one.
    """

    addresses: tuple[str, ...]
    model: str = ""
    swarm: str = ""

    @property
    def peer(self) -> str:
        """Its peer id, base58."""
        return self.addresses[0].rpartition("/")[2]

    def is_of(self, model: str | None, swarms: Collection[str]) -> bool:
        """Whether it serves in one of these private swarms; without any, a model in public."""
        if swarms:
            return self.swarm in swarms
        return not self.swarm and model in {None, self.model}


def fingerprint(key: bytes) -> str:
    """By which those who know a private swarm's public key recognise it."""
    return hashlib.sha256(b"swarm_notebook lan\0" + key).hexdigest()[: 2 * FINGERPRINT_BYTES]


class Beacon:
    """Answers on the local network for one server, and hears others, from `start` to `stop`."""

    def __init__(self, zeroconf: AsyncZeroconf, listening: _Listening):
        self._zeroconf, self._listening = zeroconf, listening

    @classmethod
    async def start(
        cls,
        addresses: Sequence[str],
        model: str,
        swarm: bytes | None = None,
        heard: Callable[[Found], None] = lambda _: None,
    ) -> Beacon:
        """Begin to answer.

        Args:
            addresses: multiaddrs under which the server is reached, with its peer id.
            model: the prefix of the model's keys in the DHT; not told of a private swarm.
            swarm: the public key of a private swarm.
            heard: gets every other server of the same swarm that answers, now or later.

        Raises:
            AddressError: none of the addresses leads to this machine from another one.
            Unsupported: `zeroconf` is not installed.
        """
        zeroconf = _package()
        port, peer, hosts = _reachable(addresses)
        words = {"peer": peer}
        model = model.encode()[:MAX_NAME].decode(errors="ignore")
        if swarm is None:
            words["model"] = model
        else:
            words["swarm"] = fingerprint(swarm)
        service = zeroconf.asyncio.AsyncServiceInfo(
            SERVICE,
            f"{peer}.{SERVICE}",
            port=port,
            parsed_addresses=hosts,
            properties=words,
            server=f"{peer}.local.",
        )
        made = zeroconf.asyncio.AsyncZeroconf()
        try:
            await (await made.async_register_service(service))
        except BaseException:
            await made.async_close()
            raise
        own = None if swarm is None else fingerprint(swarm)

        def other(found: Found) -> None:
            if found.peer != peer and found.is_of(model, {own} if own else set()):
                heard(found)

        return cls(made, _Listening(zeroconf, made, other))

    async def stop(self) -> None:
        """Take back what was said, and answer no more."""
        await self._listening.stop()
        await self._zeroconf.async_unregister_all_services()
        await self._zeroconf.async_close()


async def look(
    seconds: float = LOOK_SECONDS, wanted: Callable[[Found], bool] = lambda _: True
) -> list[Found]:
    """Servers that answer on the local network.

    Args:
        seconds: how long to wait for the first that is wanted.

    Raises:
        Unsupported: `zeroconf` is not installed.
    """
    zeroconf = _package()
    found: dict[str, Found] = {}
    first = asyncio.Event()

    def heard(one: Found) -> None:
        if wanted(one) and len(found) < MAX_SERVERS:
            found[one.peer] = one
            first.set()

    async with _opened(zeroconf) as opened:
        listening = _Listening(zeroconf, opened, heard)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(first.wait(), seconds)
            await asyncio.sleep(MORE_SECONDS)
        await listening.stop()
    return [found[peer] for peer in sorted(found)]


class _Listening:
    """Asks for servers, and each that answers for its details, until it is stopped.

    Args:
        heard: gets what is to be read; called in the running loop.
    """

    def __init__(self, zeroconf: Any, opened: AsyncZeroconf, heard: Callable[[Found], None]):
        self._package, self._opened, self._heard = zeroconf, opened, heard
        # Answers to all: those to who asks alone go to one of a machine's resolvers, perhaps
        # another.
        self._to_all = zeroconf.DNSQuestionType.QM
        self._asking: set[asyncio.Task[None]] = set()
        self._browser = zeroconf.asyncio.AsyncServiceBrowser(
            opened.zeroconf, SERVICE, handlers=[self._changed], question_type=self._to_all
        )

    async def stop(self) -> None:
        await self._browser.async_cancel()
        asking = list(self._asking)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _changed(self, *, name: str, state_change: Any, **_: Any) -> None:
        # One that has come back from elsewhere is known by its name already.
        gone = state_change is self._package.ServiceStateChange.Removed
        if not gone and len(self._asking) < MAX_SERVERS:
            task = asyncio.create_task(self._ask(name))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, name: str) -> None:
        service = self._package.asyncio.AsyncServiceInfo(SERVICE, name)
        try:
            await service.async_request(
                self._opened.zeroconf, LOOK_SECONDS * 1000, question_type=self._to_all
            )
            read = _read(service)
        except Exception as error:
            logger.warning("a server of the local network cannot be asked: %r", error)
            return
        if read is not None:
            self._heard(read)


async def peers(
    model: str | None, given: Collection[str] = (), swarm: bytes | None = None
) -> list[str]:
    """Addresses of servers on the local network: those of private swarms, else of a model's.

    Args:
        model: the prefix of its keys in the DHT; None takes the one that is served.
        given: what is known besides, perhaps invitations.
        swarm: the public key of a private swarm, as those of invitations.

    Raises:
        ModelNotServed: several models are served, and none is named.
        Unsupported: `zeroconf` is not installed.
    """
    swarms = {fingerprint(Invitation.read(one).swarm) for one in given if is_invitation(one)}
    if swarm is not None:
        swarms.add(fingerprint(swarm))
    found = await look(wanted=lambda one: one.is_of(model, swarms))
    models = sorted({one.model for one in found})
    if len(models) > 1:
        raise ModelNotServed(
            f"model: on this network are {', '.join(models)}; name one with model=…"
        )
    return [address for one in found for address in one.addresses]


def nobody(model: str | None) -> ConnectionFailed:
    """What to say if `peers` were wanted and there are none."""
    served = "a swarm" if model is None else f"a swarm of {model}"
    return ConnectionFailed(
        f"lan: no server of {served} answers on this network; one is started with "
        "`swarm-notebook serve … --lan`, and a private swarm is found with its invitation only"
    )


def _package() -> Any:
    try:
        import zeroconf
        import zeroconf.asyncio
    except ModuleNotFoundError:
        raise Unsupported(
            "lan: this needs the package zeroconf; install it with "
            "`pip install 'swarm-notebook[lan]'`"
        ) from None
    return zeroconf


@contextlib.asynccontextmanager
async def _opened(zeroconf: Any) -> AsyncIterator[AsyncZeroconf]:
    opened = zeroconf.asyncio.AsyncZeroconf()
    try:
        yield opened
    finally:
        await opened.async_close()


def _reachable(addresses: Sequence[str]) -> tuple[int, str, list[str]]:
    """The port, the peer id, and the IP addresses that others on the network can use."""
    hosts: dict[int, list[str]] = {}
    peer = ""
    for address in addresses:
        parts = address.split("/")
        if len(parts) == 7 and parts[1] in {"ip4", "ip6"} and parts[3] == "tcp":  # /ip4/…/p2p/…
            ip, peer = ipaddress.ip_address(parts[2]), parts[6]
            if not (ip.is_loopback or ip.is_link_local):
                hosts.setdefault(int(parts[4]), []).append(parts[2])
    if not hosts:
        raise AddressError(
            f"lan: no other machine reaches this server, which listens at {', '.join(addresses)}; "
            "give it an address of the network, such as --host-maddrs /ip4/0.0.0.0/tcp/0"
        )
    port = max(hosts, key=lambda one: len(hosts[one]))
    return port, peer, hosts[port]


def _read(service: Any) -> Found | None:
    """What an answer says; None if that is nothing of ours."""
    words = {key: value or b"" for key, value in service.properties.items()}
    peer, model, swarm = (
        words.get(key, b"").decode(errors="replace") for key in (b"peer", b"model", b"swarm")
    )
    addresses = []
    for host in service.parsed_addresses():
        ip = ipaddress.ip_address(host)
        if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
            continue
        address = f"/ip{ip.version}/{ip}/tcp/{service.port}/p2p/{peer}"
        with contextlib.suppress(AddressError):
            parse_peers([address])
            addresses.append(address)
    return Found(tuple(addresses), clean(model), clean(swarm)) if addresses else None
