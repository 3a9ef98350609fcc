"""What the client knows of the swarm at one moment, as the plain facts that `status` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm_notebook.client.servers.routing import token_seconds
from swarm_notebook.net.records import ServerSpan, ServerState
from swarm_notebook.net.tensors import COMPRESSIONS
from swarm_notebook.report.status import RouteHop, RouteTable, ServerRow, SwarmStatus

if TYPE_CHECKING:
    from swarm_notebook.client.servers.directory import Directory, Snapshot


def status_of(model: str, directory: Directory) -> SwarmStatus:
    """What the client knows now."""
    snapshot = directory.snapshot
    rows = tuple(_server_row(span, snapshot, directory) for span in snapshot.spans)
    named = (word for word, kind in COMPRESSIONS.items() if kind == directory.compression)
    return SwarmStatus(model, directory.num_blocks, rows, snapshot.when, next(named, None))


def route_of(model: str, directory: Directory) -> RouteTable:
    """The servers that the client would ask now."""
    chain = directory.chain(0, directory.num_blocks)
    hops = (
        RouteHop(
            segment.start,
            segment.end,
            segment.peer,
            segment.span.name,
            1000 * seconds,
        )
        for segment, seconds in zip(chain, token_seconds(chain, directory.links), strict=True)
    )
    return RouteTable(model, tuple(hops))


def _server_row(span: ServerSpan, snapshot: Snapshot, directory: Directory) -> ServerRow:
    info, avoided = span.info, directory.avoided(span.peer)
    return ServerRow(
        name=span.name,
        peer_id=span.peer,
        start=span.start,
        end=span.end,
        state="avoided" if avoided else ServerState(info.state).name.lower(),
        rtt=directory.rtt.get(span.peer),
        block_rps=info.inference_rps,
        dtype=info.torch_dtype,
        quant=info.quant_type,
        cache_left=info.cache_tokens_left,
        cache_total=info.cache_tokens_total,
        version=info.version,
        note=avoided,
        announced=snapshot.announced.get(span.peer),
        heard=directory.heard.get(span.peer),
    )
