"""What is mended in hivemind 1.1.12 from outside, each where anybody in the network could use it.

- `bound_nesting`: its decoder calls itself for tuples inside of tuples, and overflows the stack.
- `mend_calls`: its records of unary calls lose an answer, and keep what was given up for ever.
- `know_all_identities`: its check for a twin reads RSA keys only.
- `allow_clocks`: it takes clocks that differ by three seconds for a reason to stay away.
- `ReadableValues`: a value in the DHT that cannot be decoded leaves a search without an end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from hivemind.dht import protocol as dht_protocol
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.utils import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from swarm_notebook.net.identity import Identity

# An honest message nests few (a server's record is a tuple with one of names inside); about two
# hundred overflow the stack.
MAX_DEPTH = 8
# Between two clocks, in seconds. Records are valid for two minutes and announced every minute, so
# that with this much of a difference one is still read before the next one comes.
MAX_CLOCK_SECONDS = 60.0

_TUPLE = MSGPackSerializer._TUPLE_EXT_TYPE_CODE
_NONE = MSGPackSerializer.dumps(None)
_here = threading.local()


class _Bounded:
    """Decodes one of msgpack's extension types, as hivemind asks for it."""

    def __init__(self, decode: Callable[[bytes], Any]):
        self._decode = decode

    def unpackb(self, data: bytes) -> Any:
        depth = getattr(_here, "depth", 0)
        if depth == MAX_DEPTH:
            return data
        _here.depth = depth + 1
        try:
            return self._decode(data)
        finally:
            _here.depth = depth


def bound_nesting() -> None:
    """From now on, hivemind decodes nothing deeper than `MAX_DEPTH` in this process.

    Metadata and DHT values are msgpack, in which a tuple travels as a byte string with msgpack of
    its own. hivemind's decoder calls itself for every tuple inside of a tuple, through C: two
    hundred of them, less than a kilobyte and sent by anybody, end the process. What lies deeper
    stays bytes, as hivemind leaves what it does not know, and its reader finds that it is not what
    is expected.
    """
    known = MSGPackSerializer._ext_type_codes
    if _TUPLE in known:
        return
    # Both decode what they contain in the same way.
    for kind in (DictionaryDHTValue, BatchTensorDescriptor):
        known[MSGPackSerializer._ext_types[kind]] = _Bounded(kind.unpackb)
    known[_TUPLE] = _Bounded(lambda data: tuple(MSGPackSerializer.loads(data)))


def allow_clocks() -> None:
    """From now on, a peer joins those whose clocks differ from its own by `MAX_CLOCK_SECONDS`."""
    dht_protocol.MAX_DHT_TIME_DISCREPANCY_SECONDS = MAX_CLOCK_SECONDS


def know_all_identities() -> None:
    """From now on, hivemind finds the peer of any identity file that the network daemon reads."""
    PeerID.from_identity = staticmethod(lambda file: Identity(file).peer_id)


def mend_calls(p2p: P2P) -> None:
    """Let a peer forget unary calls that have ended; to be called before there are any."""
    control = p2p._client.control
    control._pending_calls = _PendingCalls()
    control._handler_tasks = _HandlerTasks()


class _PendingCalls(dict[Any, asyncio.Future]):
    """Calls whose answer is waited for: one that was given up is not among them any more.

    hivemind looks a call up here before it hands over its answer. When the answer comes in the very
    turn of the loop in which the call runs out of time, it would raise, and never read again: the
    node would be deaf to all answers from then on.
    """

    def __contains__(self, call: object) -> bool:
        future = self.get(call)
        return future is not None and not future.done()


class _HandlerTasks(dict[Any, asyncio.Task]):
    """Calls that are answered at present.

    hivemind leaves those in here that are taken back before they are answered, for ever, with all
    the bytes of the request: a notebook could fill a server's memory by asking and giving up.
    """

    def __setitem__(self, call: Any, task: asyncio.Task) -> None:
        super().__setitem__(call, task)
        task.add_done_callback(lambda _: self.pop(call, None))


class ReadableValues(RecordValidatorBase):
    """Lets every record pass, with None in place of a value that cannot be decoded.

    Anybody can store bytes, under anybody's key. hivemind decodes what it has found at the end of a
    search, and what cannot be decoded breaks that off: whoever waits for the search waits for ever.
    None is no record of ours, and the others under the same key are read as they are.
    """

    def validate(self, record: DHTRecord) -> bool:
        # To refuse one would be to refuse all that a peer has under the same key.
        return True

    def strip_value(self, record: DHTRecord) -> bytes:
        try:
            MSGPackSerializer.loads(record.value)
        except Exception:  # a different type per malformation
            return _NONE
        value: bytes = record.value
        return value
