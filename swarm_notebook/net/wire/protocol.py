"""The requests between notebook and servers: names, metadata keys, tensor slots.

This is Petals' protocol (the RPCs of its ``TransformerConnectionHandler``) with additions that
only servers which announce ``swarm_notebook`` in their record are sent:

- inference requests may carry an attention mask and position ids of the new tokens (tensor slots
  3 and 4; forward requests: 2 and 3), and name any sub-range of the hosted blocks in ``uid``;
- ``states`` in the metadata lists block indices whose outputs come back after the result;
- row indices (slot 2, Petals' ``hypo_ids``) may change the batch size;
- ``times`` in the metadata of a step's answer says where its time went in the server: seconds of
  serialisation, queue and compute;
- ``push_to`` in a step's metadata names a peer and a session of it: the output goes there, over
  ``rpc_push_stream``, besides to the client (whose answer says ``push_failed`` and why if it did
  not). ``push_from`` names the peer that will push the input; slot 0 is then a dummy. The client
  may send the input after all, under the same ``step_id``; if it was used, the answer says
  ``filled``. An input without positions gives the step up, if it has not begun: nothing is
  computed, the answer has no positions either, and the session goes on;
- ``last_positions`` in a step's metadata says how many of the last positions of the last block's
  output the client wants; all of them go on to the next server all the same;
- ``print`` in a step's metadata is the seed by which the server says what was pushed to it: its
  print (`net.wire.prints`) comes under the same name in the answer's;
- ``signature`` (and ``signature_key``) in a push's metadata are its sender's
  (`net.wire.hand_overs`). A request with ``prove`` in its metadata, a session of the same client
  and a step in it, is answered with ``proof``: hash, signature and key of what was pushed for it;
- ``copy_of`` in the metadata of a session's first step names another session of the same client on
  this server, and the last step of it: the session begins with a copy of its cache;
- ``compute_dtype`` in the metadata of a forward or backward request names the dtype to compute it
  in, whatever the server's own: for comparisons of what two servers answer.

A slot that is not used holds a dummy, an empty tensor, as in Petals. Metadata is msgpack in
hivemind's dialect; it is read under a size bound and yields a plain dict.
"""

from __future__ import annotations

from typing import Any

import torch
from hivemind.utils import MSGPackSerializer

from swarm_notebook.errors import BadRequest
from swarm_notebook.net.p2p.fixes import bound_nesting
from swarm_notebook.net.wire import tensors
from swarm_notebook.net.wire.message import PackedTensor

bound_nesting()

# 1: masks, states, adapters; 2: pushes from server to server, 8-bit values; 3: `compute_dtype`;
# 4: `last_positions`; 5: `print`; 6: `copy_of`; 7: signed pushes
PROTOCOL_VERSION = 7
EXTENSION_KEY = "swarm_notebook"
TIMES_KEY = "times"
PUSH_TO, PUSH_FROM = "push_to", "push_from"
PUSH_FAILED, FILLED = "push_failed", "filled"
PRINT = "print"
# What goes along with a push, by which its receiver can show what it was given, and how it is
# asked to (`net.wire.hand_overs`).
SIGNATURE, SIGNATURE_KEY, PROVE, PROOF = "signature", "key", "prove", "proof"
# In the first message of a streamed answer: how many tensors it has in all.
TENSORS = "tensors"
COMPUTE_DTYPE = "compute_dtype"
LAST_POSITIONS = "last_positions"
COPY_OF = "copy_of"
# What a member of a private swarm shows (`net.membership`).
MEMBER = "member"
NEXT_SERVERS = "next_servers"  # Petals' pushes, see `server.rpc.petals_push`

_SERVICER = "TransformerConnectionHandler"
RPC_INFO = f"{_SERVICER}.rpc_info"
RPC_FORWARD = f"{_SERVICER}.rpc_forward"
RPC_FORWARD_STREAM = f"{_SERVICER}.rpc_forward_stream"
RPC_BACKWARD = f"{_SERVICER}.rpc_backward"
RPC_BACKWARD_STREAM = f"{_SERVICER}.rpc_backward_stream"
RPC_INFERENCE = f"{_SERVICER}.rpc_inference"
RPC_PUSH = f"{_SERVICER}.rpc_push"
RPC_PUSH_STREAM = f"{_SERVICER}.rpc_push_stream"
RPC_ADAPTER = f"{_SERVICER}.rpc_adapter"

UID_DELIMITER = "."
CHAIN_DELIMITER = " "

# A unary message above 4 MiB is refused by p2pd, an answer above it is lost without a word.
MAX_UNARY_BYTES = 4 * 1024**2 - 64 * 1024
PART_BYTES = 4 * 1024**2
# A config of an adapter is some kB, a request for all states of 126 blocks less than one.
MAX_METADATA_BYTES = 1 << 20
# The largest model that Petals served has 126 blocks (Llama 3.1 405B).
MAX_BLOCKS = 4096

DUMMY = torch.empty(0)
DUMMY_INT64 = torch.empty(0, dtype=torch.int64)
_PACKED_DUMMY = tensors.pack(DUMMY)
_PACKED_DUMMY_INT64 = tensors.pack(DUMMY_INT64)


def block_uid(prefix: str, index: int) -> str:
    """The DHT key of one block."""
    return f"{prefix}{UID_DELIMITER}{index}"


def uid_chain(prefix: str, start: int, end: int) -> str:
    """The ``uid`` of a request for blocks ``[start, end)``."""
    return CHAIN_DELIMITER.join(block_uid(prefix, index) for index in range(start, end))


def parse_uid_chain(text: str, prefix: str) -> tuple[int, int]:
    """The block range ``[start, end)`` that a request's ``uid`` names.

    Raises:
        BadRequest: another model's prefix, no integer index, or blocks that are not contiguous.
    """
    count = 1 + text.count(CHAIN_DELIMITER)
    if count > MAX_BLOCKS:
        raise BadRequest(f"a request names {count} blocks, at most {MAX_BLOCKS} are read")
    uids = text.split(CHAIN_DELIMITER)
    indices = []
    for uid in uids:
        found, delimiter, index = uid.rpartition(UID_DELIMITER)
        if not delimiter or found != prefix or not (index.isascii() and index.isdigit()):
            raise BadRequest(f"block uid {uid[:80]!r} is not of the form '{prefix}.<index>'")
        indices.append(int(index[:8]))
    start, end = indices[0], indices[0] + len(indices)
    if indices != list(range(start, end)):
        raise BadRequest(f"the blocks {indices[:8]}… of a request are not contiguous")
    return start, end


def pack_metadata(values: dict[Any, Any]) -> bytes:
    return MSGPackSerializer.dumps(values)


def unpack_metadata(data: bytes) -> dict[Any, Any]:
    """The metadata dict of a request or response; an empty one for no bytes.

    Raises:
        BadRequest: too long, no msgpack, or not a dict with string keys.
    """
    if not data:
        return {}
    if len(data) > MAX_METADATA_BYTES:
        raise BadRequest(f"metadata of {len(data)} bytes, at most {MAX_METADATA_BYTES} are read")
    try:
        values = MSGPackSerializer.loads(data)
    except Exception as error:  # hivemind's decoder raises a different type per malformation
        raise BadRequest(f"the metadata is not msgpack: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise BadRequest(f"the metadata is a {type(values).__name__}, expected a dict of names")
    return values


def pack_slots(
    slots: list[torch.Tensor | None], always: int = 3, compression: int = tensors.NONE
) -> list[PackedTensor]:
    """The tensors of a request by position; None becomes a dummy.

    The first ``always`` slots travel in any case (Petals insists on them: three for inference,
    two for forward), trailing unused ones behind them do not. The first slot, the hidden states,
    is compressed.
    """
    while len(slots) > always and slots[-1] is None:
        slots = slots[:-1]
    return [
        tensors.pack(slot, tensors.NONE if position else compression)
        if slot is not None
        else (_PACKED_DUMMY_INT64 if position >= 2 else _PACKED_DUMMY)
        for position, slot in enumerate(slots)
    ]
