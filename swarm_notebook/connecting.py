"""Attaching a notebook to a swarm: `connect`, and `look` for those who only want to see it.

`connect` joins a swarm (or starts an embedded one, of server processes on this machine), builds
the remote model and returns a `Swarm`.
"""

from __future__ import annotations

import contextvars
import gc
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from swarm_notebook.checkpoint.files.digest import digest
from swarm_notebook.checkpoint.files.source import resolve
from swarm_notebook.client.connection import Connection
from swarm_notebook.client.discovery import await_spans, choose_dtype, only_model, only_record
from swarm_notebook.client.loop import network_thread
from swarm_notebook.client.servers.bits import WHOLE_BITS
from swarm_notebook.client.servers.directory import PATIENCE
from swarm_notebook.devices import AUTO, device_named
from swarm_notebook.errors import DeviceMissing
from swarm_notebook.local.swarm import LocalSwarm
from swarm_notebook.model import home, skeleton
from swarm_notebook.model.home import Blocks
from swarm_notebook.model.judge import HomeJudge
from swarm_notebook.net import lan as net_lan
from swarm_notebook.net.addresses import addresses_of, is_public
from swarm_notebook.net.membership.invitation import Invitation, is_invitation
from swarm_notebook.net.wire.tensors import COMPRESSIONS, NONE
from swarm_notebook.progress import Waiting
from swarm_notebook.report.status import SwarmStatus, status_of
from swarm_notebook.swarm import Swarm

if TYPE_CHECKING:
    from swarm_notebook.net.dht.records import ServerSpan

logger: logging.Logger = logging.getLogger(__name__)

# Of what is computed anyway: a fiftieth is lost among the differences between two runs, and who
# always answers wrong is found after 50 requests on average, a new server sooner (`choice`).
SPOT_RATE = 0.02
_SOON = 1.0  # seconds in which the cell that connects has put the new swarm into its variable


def connect(
    initial_peers: Sequence[str] | str | LocalSwarm | None = None,
    *,
    lan: bool = False,
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    timeout: float = PATIENCE,
    compression: str | None = None,
    own: Blocks = (),
    min_bits: float | None = None,
    device: str | torch.device = AUTO,
    verify: str | float | None = None,
    verify_here: bool = False,
) -> Swarm:
    """Attach to a swarm and build the remote model.

    Args:
        initial_peers: multiaddrs of one or more peers, an invitation to a private swarm, or a
            `LocalSwarm`. None starts an embedded swarm: two server processes on this machine.
        lan: look for servers on the local network, which were started with ``--lan``: of the model,
            or of the private swarm of an invitation.
        model: a Hub id, a folder or a GGUF file, as the servers were given it; its embeddings,
            norm and head are loaded here. None takes the demo model for an embedded swarm, else
            what an invitation names, or the one model that the swarm serves.
        dtype: of the local part, such as ``"float32"``; None takes what the servers compute in.
        timeout: seconds to wait for a server when some blocks have none, and for one at all after
            the swarm was joined.
        compression: of hidden states on their way: None sends them as the servers compute,
            ``"float16"`` halves float32, ``"int8"`` sends 9 bits per value, which shifts the
            logits a little (Petals servers do without it). Passes that a backward follows are
            never compressed.
        own: blocks to bring home at once, see `Swarm.own`; no server needs to hold them.
        min_bits: servers whose weights have fewer bits each are not used, also not when others are
            lost: 16 takes whole weights only. None takes all, and says so once.
        device: where embeddings, norm, head and blocks at home live: ``"cuda:1"``, ``"mps"``,
            ``"cpu"``; "auto" is a GPU where there is one with room for them. Inputs belong
            there, too: ``ids.to(swarm.model.device)``.
        verify: how much of what servers answer is audited: replayed on other servers in the
            background, see `Swarm.audit`. ``"spot"`` computes `SPOT_RATE` more for it, ``"off"``
            nothing, a number such a share. None is ``"spot"`` for peers with public addresses,
            ``"off"`` for others and in private swarms. It keeps one more hidden state per token of
            a text.
        verify_here: load blocks for a moment, one by one, to decide here what servers disagree on
            or what no other server can replay.

    Raises:
        AddressError, ConnectionFailed: the peers cannot be reached, or nobody is found.
        InvitationError: the invitation is no whole one, or is refused.
        NotAMember: the swarm is private, and there is no invitation, or it holds no more.
        ModelNotFound, ModelNotServed: the model does not exist, or nobody serves it.
        OtherCheckpoint: it is served with other weights, or another config.
        DeviceMissing: this machine does not have the device, or no room on it.
        ValueError: ``compression`` or ``verify`` is none of these.
    """
    placed = device_named(device)
    if lan:
        initial_peers = _on_lan(initial_peers, model)
    rate = audit_rate(verify, initial_peers)
    compressed = _compression(compression)
    local: LocalSwarm | None = None
    connection: Connection | None = None
    try:
        if initial_peers is None:
            local = LocalSwarm(model)
            initial_peers = local.initial_peers
            model = local.model
        if isinstance(initial_peers, LocalSwarm):
            model = initial_peers.model if model is None else model
            local_peers = initial_peers
            initial_peers = (
                [local_peers.invite()] if local_peers.private else local_peers.initial_peers
            )
        peers = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
        if model is None:
            # Its folder or file, which no record tells.
            model = LocalSwarm.model_at(addresses_of(peers)) or _invited_to(peers)
        with Waiting("Joining the swarm") as waiting:
            source = resolve(model if model is not None else only_model(peers))
            config = source.config()
            blocks = config.num_hidden_layers
            connection = Connection(peers, source.dht_prefix, blocks, timeout, digest(source))
            owned = home.which(own, blocks) if own != () else []
            connection.directory.home = frozenset(owned)
            connection.directory.compression = compressed
            connection.directory.min_bits = min_bits or 0.0
            spans = await_spans(connection, source.name, peers, waiting)
            if min_bits is None:
                _tell_coarse(spans)
            waiting.say("Loading what runs here: embeddings, norm and head")
            built = skeleton.build(source, connection, choose_dtype(dtype, spans))
            place(built, placed, anywhere=device == AUTO)
        home.bring_home(built, source, owned)
        if rate:
            connection.audit(rate, HomeJudge(source) if verify_here else None)
        _hold(connection, local)
        return Swarm(source, built, connection, local)
    except BaseException:
        if connection is not None:
            connection.close()
        if local is not None:
            local.close()
        raise


def place(model: nn.Module, device: torch.device, *, anywhere: bool) -> None:
    """Move what runs in the notebook to a device.

    Args:
        anywhere: leave it on the processor if there is no room.

    Raises:
        DeviceMissing: there is no room.
    """
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        model.to("cpu")
        message = f"{device} has no room for embeddings, norm and head"
        if not anywhere:
            raise DeviceMissing(f"device: {message}: {error}; give device='cpu'") from None
        logger.warning("%s: they run on the processor", message)


# Embedded swarms, by the connection that keeps them: a `Swarm` and its model both hold it.
_embedded: weakref.WeakKeyDictionary[Connection, LocalSwarm] = weakref.WeakKeyDictionary()


def _hold(connection: Connection, local: LocalSwarm | None) -> None:
    """Let an embedded swarm end with the last that uses it, and tell which of before still run."""
    if local is None:
        return
    connection.end_with_me(local.close)
    _embedded[connection] = local
    run = contextvars.copy_context().run  # the words belong to the cell that connects
    timer = threading.Timer(_SOON, run, [_tell_others])
    timer.daemon = True
    timer.start()


def _tell_others() -> None:
    gc.collect()  # models are full of circles; what nobody holds ends here
    running = [local for connection, local in _embedded.items() if connection.is_open]
    others = len(running) - 1
    if others > 0:
        logger.warning(
            "%s still running, with server processes of %s: a variable, such as model, still "
            "refers to %s. Delete or replace that variable, or call disconnect() on the earlier "
            "swarm",
            "an earlier embedded swarm is"
            if others == 1
            else f"{others} earlier embedded swarms are",
            ", ".join(sorted({Path(local.model).name for local in running})),
            "it" if others == 1 else "them",
        )


def _on_lan(
    given: Sequence[str] | str | LocalSwarm | None, model: str | os.PathLike[str] | None
) -> list[str]:
    """The peers that were given, and those that the local network has."""
    if isinstance(given, LocalSwarm):
        raise ValueError("lan: a LocalSwarm is on this machine; connect to it, or to the network")
    peers = [given] if isinstance(given, str) else list(given or [])
    named = None if model is None else resolve(model).dht_prefix
    found = network_thread().run(net_lan.peers(named, peers))
    if not found and not peers:
        raise net_lan.nobody(named)
    return [*peers, *found]


def _invited_to(peers: Sequence[str]) -> str | None:
    """The model that an invitation names."""
    named = (Invitation.read(peer).model for peer in peers if is_invitation(peer))
    return next((model for model in named if model), None)


def _tell_coarse(spans: Sequence[ServerSpan]) -> None:
    """Say that results will not be those of the model's own weights."""
    # Without an error they are as they were published.
    coarse = [
        span
        for span in spans
        if span.weight_bits < WHOLE_BITS
        and (span.info.weight_bits is None or span.info.weight_error is not None)
    ]
    if coarse:
        least = min(span.weight_bits for span in coarse)
        logger.warning(
            "%d of %d servers have weights of %.3g bits or more: results differ from those of the "
            "original weights. sn.connect(min_bits=16) uses those only, min_bits=%.3g accepts "
            "these without a warning",
            len(coarse),
            len(spans),
            least,
            least,
        )


def _compression(name: str | None) -> int:
    """What stands for a compression on the wire.

    Raises:
        ValueError: there is none of this name.
    """
    if name is not None and name not in COMPRESSIONS:
        raise ValueError(
            f"compression: {name!r}, expected {' or '.join(map(repr, COMPRESSIONS))} or None"
        )
    return COMPRESSIONS.get(name or "", NONE)


def audit_rate(verify: str | float | None, peers: Sequence[str] | str | LocalSwarm | None) -> float:
    """Which share of the work is audited.

    Args:
        verify, peers: as `connect` was given them.

    Raises:
        ValueError: ``verify`` says nothing of the kind.
    """
    if verify is None:
        given: Sequence[str] | str = []
        if peers is not None and not isinstance(peers, LocalSwarm):
            given = peers
        invited = any(map(is_invitation, [given] if isinstance(given, str) else given))
        public = not invited and any(is_public(peer) for peer in addresses_of(given))
        verify = "spot" if public else "off"
    if isinstance(verify, str) and verify in ("spot", "off"):
        return SPOT_RATE if verify == "spot" else 0.0
    if isinstance(verify, (int, float)) and not isinstance(verify, bool) and 0 <= verify <= 1:
        return float(verify)
    raise ValueError(f"verify: {verify!r}, expected 'spot', 'off' or a share from 0 to 1")


def look(
    initial_peers: Sequence[str] | str, *, model: str | os.PathLike[str] | None = None
) -> SwarmStatus:
    """Who serves which blocks of a model, without attaching to it.

    Args:
        initial_peers: multiaddrs of one or more peers of the swarm, or an invitation.
        model: as the servers were given it; None takes the one model that the swarm serves.

    Raises:
        AddressError, ConnectionFailed: the peers cannot be reached.
        ModelNotServed: the swarm serves several models, or none.
    """
    peers = [initial_peers] if isinstance(initial_peers, str) else list(initial_peers)
    if model is None:
        name, record = only_record(peers)
        prefix, blocks = name, record.num_blocks
    else:
        source = resolve(model)
        name, prefix, blocks = source.name, source.dht_prefix, source.config().num_hidden_layers
    connection = Connection(peers, prefix, blocks)
    try:
        return status_of(name, connection.directory)
    finally:
        connection.close()
