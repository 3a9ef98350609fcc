"""Where peers are reached: multiaddrs, by themselves or inside of invitations."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from hivemind.utils.multiaddr import Multiaddr

from swarm_notebook.errors import AddressError
from swarm_notebook.net.membership.invitation import Invitation, is_invitation

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def is_public(address: str) -> bool:
    """Whether a multiaddr leads out of this machine and its own network."""
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return True  # a name in the DNS, or what will be refused soon
    try:
        return ipaddress.ip_address(parts[2]).is_global
    except ValueError:
        return True


def parse_address(name: str, address: str, form: str) -> Multiaddr:
    """A multiaddr.

    Args:
        name: of the option that it comes from.
        form: what is expected.

    Raises:
        AddressError: it is malformed.
    """
    try:
        multiaddr = Multiaddr(str(address))
        multiaddr.protocols()
    except Exception as error:  # hivemind's parser raises a different type per malformation
        raise AddressError(
            f"{name}: {address!r} is not an address ({error}); expected the form {form}"
        ) from None
    return multiaddr


def parse_peers(addresses: Sequence[str]) -> list[Multiaddr]:
    """The multiaddrs of bootstrap peers.

    Raises:
        AddressError: an address is malformed or lacks the peer's id.
    """
    parsed = []
    for address in addresses:
        multiaddr = parse_address(
            "initial_peers", address, "/ip4/<address>/tcp/<port>/p2p/<peer id>"
        )
        if not any(protocol.name == "p2p" for protocol in multiaddr.protocols()):
            raise AddressError(f"initial_peers: {address!r} lacks the peer id (/p2p/…)")
        parsed.append(multiaddr)
    return parsed


def addresses_of(peers: Sequence[str]) -> list[str]:
    """The addresses among peers that were given, and those in invitations.

    Raises:
        InvitationError: an invitation is no whole one.
    """
    if isinstance(peers, str):
        peers = [peers]
    found: list[str] = []
    for peer in peers:
        found += Invitation.read(peer).addresses if is_invitation(peer) else [str(peer)]
    return found
