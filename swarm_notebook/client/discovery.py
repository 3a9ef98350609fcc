"""What a swarm serves, as far as it must be known before a model is built on it.

A swarm that has just been joined may know nothing yet, or its servers may be joining themselves:
the functions here wait for as long as there is hope, and then say what is missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from swarm_notebook.client.connection import Connection, served_models
from swarm_notebook.client.servers.routing import describe_blocks
from swarm_notebook.client.servers.waiting import check_checkpoint, check_membership
from swarm_notebook.errors import ConnectionFailed, MissingBlocks, ModelNotServed
from swarm_notebook.net.dht.records import ModelRecord, ServerSpan, ServerState
from swarm_notebook.net.wire.tensors import dtype_from_name
from swarm_notebook.progress import Waiting

logger: logging.Logger = logging.getLogger(__name__)

# A DHT search gives up on a silent peer after 3 s: some readings, and longer than one of those.
SILENCE_SECONDS, SILENT_READINGS = 4.0, 4
# For the index of models when there is no time left: a search among peers that answer.
INDEX_SECONDS = 1.0
_HUB = "https://huggingface.co/"


def only_record(peers: Sequence[str]) -> tuple[str, ModelRecord]:
    """The one model that a swarm serves, by its index in the DHT: its prefix and record."""
    served = served_models(peers)
    if len(served) != 1:
        listed = ", ".join(sorted(served)) or "none"
        raise ModelNotServed(f"model: the swarm serves {listed}; name one with model=…")
    return next(iter(served.items()))


def only_model(peers: Sequence[str]) -> str:
    """The Hub repository of the one model that a swarm serves."""
    prefix, record = only_record(peers)
    if record.repository is None or not record.repository.startswith(_HUB):
        raise ModelNotServed(
            f"model: the swarm serves {prefix}, but does not say where its embeddings and head "
            "can be loaded from; give the folder or file with model=…"
        )
    return record.repository.removeprefix(_HUB)


def await_spans(
    connection: Connection, name: str, peers: Sequence[str], waiting: Waiting
) -> tuple[ServerSpan, ...]:
    """What is served of the model; waits for servers that are just joining.

    A swarm that says nothing of the model is asked again for a moment only: most likely nobody
    serves it, but a peer of the DHT may have been too busy to answer in time. Where no peer says
    anything at all, that tells nothing of the model.
    """
    directory = connection.directory
    readings, warned = 1, False
    deadline = directory.began + directory.patience
    while not (spans := directory.snapshot.spans) or directory.missing():
        check_checkpoint(directory)
        check_membership(directory)
        waited = time.monotonic() - directory.began
        if waited > directory.patience:
            break
        if (
            not spans
            and readings >= SILENT_READINGS
            and waited > SILENCE_SECONDS
            and connection.in_touch
        ):
            break
        waiting.say(f"Waiting for servers of {describe_blocks(directory.missing())}")
        if not warned:
            logger.warning("waiting for servers of %s", describe_blocks(directory.missing()))
            warned = True
        time.sleep(0.5)
        connection.refresh(max(deadline - time.monotonic(), 0.0))
        readings += 1
    if not spans and not connection.in_touch:
        raise ConnectionFailed(
            f"model {name!r}: no peer of this swarm has answered for {directory.patience:.0f} s, "
            "though they let this notebook in before; look whether their machines are overloaded "
            "or asleep, and connect again"
        )
    if not any(span.info.state == ServerState.ONLINE for span in spans):
        raise ModelNotServed(
            f"model {name!r}: nobody in this swarm serves {connection.prefix!r}; it serves "
            f"{_served(peers, deadline)}. Start a server with "
            f"`swarm-notebook serve {name} --initial-peers …`"
        )
    if missing := directory.missing():
        had = directory.who_had(missing[0], missing[-1] + 1)
        waited = time.monotonic() - directory.began
        raise MissingBlocks(
            f"model {name!r}: no server holds {describe_blocks(missing)}"
            f"{had or '; nobody announces them'}. Waited {waited:.0f} s for one; start one with "
            f"`swarm-notebook serve {name} --blocks {missing[0]}:{missing[-1] + 1} "
            "--initial-peers …`, or call again"
        )
    return spans


def _served(peers: Sequence[str], deadline: float) -> str:
    """What a swarm serves instead, in words, as far as that is known in time."""
    try:
        models = served_models(peers, max(deadline - time.monotonic(), INDEX_SECONDS))
    except TimeoutError:
        return "what it did not say in time"
    return ", ".join(sorted(models)) or "no model"


def choose_dtype(wanted: str | torch.dtype | None, spans: Sequence[ServerSpan]) -> torch.dtype:
    """Of the part of the model that runs here: what is wanted, else what all servers compute in."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted is not None:
        return dtype_from_name(wanted)
    announced = {span.info.torch_dtype for span in spans}
    common = announced.pop() if len(announced) == 1 else None
    return dtype_from_name(common) if common else torch.float32
