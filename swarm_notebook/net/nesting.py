"""A bound on the recursion of hivemind's decoder.

Metadata and DHT values are msgpack, in which a tuple travels as a byte string with msgpack of its
own. hivemind's decoder calls itself for every tuple inside of a tuple, through C: two hundred of
them, less than a kilobyte and sent by anybody, overflow the stack and end the process. So here they
are decoded down to a depth that no honest message has; what lies deeper stays bytes, as hivemind
leaves what it does not know, and its reader finds that it is not what is expected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from hivemind.dht.storage import DictionaryDHTValue
from hivemind.utils import MSGPackSerializer
from hivemind.utils.tensor_descr import BatchTensorDescriptor

MAX_DEPTH = 8

_TUPLE = MSGPackSerializer._TUPLE_EXT_TYPE_CODE
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
    """From now on, hivemind decodes nothing deeper in this process."""
    known = MSGPackSerializer._ext_type_codes
    if _TUPLE in known:
        return
    # Both decode what they contain in the same way.
    for kind in (DictionaryDHTValue, BatchTensorDescriptor):
        known[MSGPackSerializer._ext_types[kind]] = _Bounded(kind.unpackb)
    known[_TUPLE] = _Bounded(lambda data: tuple(MSGPackSerializer.loads(data)))
