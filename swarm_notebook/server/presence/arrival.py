"""How a server comes into its swarm: its node, its membership, and what keeps it there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from swarm_notebook.errors import NotAMember
from swarm_notebook.net import lan
from swarm_notebook.net.addresses import addresses_of
from swarm_notebook.net.membership.authority import Authority
from swarm_notebook.net.membership.certificate import Role
from swarm_notebook.net.membership.joining import offer
from swarm_notebook.net.node import Node
from swarm_notebook.net.p2p import daemon
from swarm_notebook.server.options import ServeOptions
from swarm_notebook.server.presence.membership import MembershipKeeper
from swarm_notebook.server.presence.residence import Residence
from swarm_notebook.server.presence.reunion import Reunion

logger: logging.Logger = logging.getLogger(__name__)

# How long the record that says offline may take, and then the end of p2pd.
GOODBYE_SECONDS = 5.0


async def start_node(options: ServeOptions, stack: AsyncExitStack, shared_name: str) -> Node:
    """Join the swarm, or begin one, under the server's own identity.

    Args:
        stack: what ends the node and what serves it.
        shared_name: of the model, on other machines, too; empty if it has none.

    Raises:
        NotAMember: in a private swarm it has a notebook's membership.
    """
    swarm = options.swarm
    authority = None if swarm is None else await asyncio.to_thread(Authority, swarm)
    identity, listen, residence = options.identity, options.host_maddrs, None
    if swarm is not None and identity is None:
        residence = Residence(swarm)
        stack.callback(residence.leave)
        identity, listen = residence.identity, residence.listen(listen)
    starting = asyncio.create_task(
        Node.start(
            options.initial_peers,
            client=False,
            host_maddrs=listen,
            identity=identity,
            credentials=None if authority is None else authority.owner(),
        )
    )
    # Shielded: hivemind would leave the daemon behind that it is just starting.
    stack.push_async_callback(_stop_node, starting)
    node = await asyncio.shield(starting)
    if residence is not None:
        residence.keep(await node.addresses())
    if node.membership is not None:
        await _take_part(stack, node, authority, shared_name)
    return node


async def _take_part(
    stack: AsyncExitStack, node: Node, authority: Authority | None, shared_name: str
) -> None:
    """Do what servers of a private swarm do besides serving."""
    _check_role(node)
    if authority is not None:
        await offer(node.p2p, authority)
    keeper = MembershipKeeper(node, authority, await node.addresses(), shared_name)
    stack.push_async_callback(keeper.stop)
    await keeper.update()
    run_beside(stack, keeper.run())


def _check_role(node: Node) -> None:
    """Say at once if others would not believe what this server announces.

    Raises:
        NotAMember: it has a notebook's membership.
    """
    member = node.membership
    if member is not None and member.role < Role.SERVER:
        raise NotAMember(
            f"the invitation to the swarm {member.name} is a notebook's; ask for one that was made "
            "with `swarm-notebook invite --role server`"
        )


async def stay_together(
    options: ServeOptions,
    stack: AsyncExitStack,
    node: Node,
    prefix: str,
    announce: Callable[[], None],
    *,
    known: Mapping[str, Sequence[str]],
) -> Reunion:
    """Keep together with the rest of the swarm; on a local network, answer who looks for it.

    Args:
        prefix: of the model's records.
        announce: is called where somebody has come back who may lack what this server announces.
        known: where peers were that the server of before knew.
    """
    reunion = Reunion(node, addresses_of(options.initial_peers), announce, known)
    if options.lan:
        key = None if node.membership is None else node.membership.swarm

        def heard(one: lan.Found) -> None:
            reunion.hear(one.peer, one.addresses)

        beacon = await lan.Beacon.start(await node.addresses(), prefix, key, heard)
        stack.push_async_callback(beacon.stop)
    run_beside(stack, reunion.run())
    return reunion


async def _stop_node(starting: asyncio.Task[Node]) -> None:
    await asyncio.wait([starting])
    if starting.exception() is not None:
        return
    node = starting.result()
    try:
        async with asyncio.timeout(GOODBYE_SECONDS):
            if daemon.lives(node.p2p):
                await node.stop()
            else:
                await daemon.clear_up(node.p2p)
    except TimeoutError:
        logger.info("the network daemon did not answer a last time")


def run_beside(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Let something run until the stack is left, which waits until it has ended."""
    task = asyncio.create_task(work)

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)
