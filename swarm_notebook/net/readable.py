"""Values in the DHT that are none: anybody can store bytes, under anybody's key.

hivemind decodes what it has found at the end of a search, and a value that cannot be decoded breaks
that off: whoever waits for the search waits for ever. So such a value is read as None, which no
record of ours is, and the others under the same key are read as they are.
"""

from __future__ import annotations

from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

_NOTHING = MSGPackSerializer.dumps(None)


class Readable(RecordValidatorBase):
    """Lets every record pass, as something that can be decoded."""

    def validate(self, record: DHTRecord) -> bool:
        # To refuse one would be to refuse all that a peer has under the same key.
        return True

    def strip_value(self, record: DHTRecord) -> bytes:
        try:
            MSGPackSerializer.loads(record.value)
        except Exception:  # a different type per malformation
            return _NOTHING
        value: bytes = record.value
        return value
