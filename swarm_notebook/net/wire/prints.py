"""Border prints: a number of the bytes that one server handed to the next.

A server whose input is pushed to it tells the notebook the print of the bytes that came, and the
notebook compares it with that of what the server before has answered: the same bytes, if both are
honest, whatever they are compressed with. The numbers by which the bytes are multiplied come of a
seed that only the receiver is told: whoever hands over cannot make other states with the same
print, and learns nothing by being caught. Two who are in league can; they are no better off than
one server of both spans, which audits find.

It is a random projection in whole numbers, so that it is the same to the bit on every machine:
two-level multiply-shift hashing (Dietzfelbinger et al., 1997, "A reliable randomized algorithm for
the closest-pair problem"). Bytes are cut into rows of `ROW_WORDS` little-endian words of 32 bits,
the last one filled up with zeros; row 0 is the tensor's header (`PackedTensor.header`): the same
bytes are other states in another dtype. With 64-bit numbers ``m`` and ``c`` from the seed, modulo
2**64,

    row_t = floor(sum_j m_j word_tj / 2**32),    print = c_0 * bytes + sum_t c_(t + 1) row_t

Different bytes have the same print with a probability of at most 2**-30 each time.
"""

from __future__ import annotations

import hashlib
import secrets
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from swarm_notebook.net.wire.message import PackedTensor

SEED_BYTES = 16
ROW_WORDS = 1024
_ROW_BYTES = 4 * ROW_WORDS
# Rows that are multiplied at once: what they take besides, as 64-bit words, is 2 MiB.
_ROWS_AT_ONCE = 256
# Printers that are kept, one per session; each takes 8 KiB, and 8 bytes per row.
_MOST_PRINTERS = 256

_Words = npt.NDArray[np.uint64]


def new_seed() -> bytes:
    """A seed that nobody can guess."""
    return secrets.token_bytes(SEED_BYTES)


@lru_cache(maxsize=_MOST_PRINTERS)
def printer(seed: bytes) -> Printer:
    """The printer of a seed; may be called from any thread."""
    return Printer(seed)


class Printer:
    """Makes prints by one seed; use `printer`."""

    def __init__(self, seed: bytes):
        self._seed = seed
        self._columns = _numbers(b"columns" + seed, ROW_WORDS)
        self._rows = _numbers(b"rows" + seed, 3)

    def of(self, packed: PackedTensor) -> int:
        """The print of a tensor's bytes as they travel, a whole number below 2**64."""
        found = np.frombuffer(packed.buffer, np.uint8)
        whole = len(found) // _ROW_BYTES
        count = 1 + -(-len(found) // _ROW_BYTES)
        if len(self._rows) <= count:
            self._rows = _numbers(b"rows" + self._seed, 2 * count + 1)
        rows = self._rows
        total = rows[:1] * np.uint64(len(found))
        total += self._sum(_padded(np.frombuffer(packed.header, np.uint8)), rows[1:2])
        for begin in range(0, whole, _ROWS_AT_ONCE):
            end = min(begin + _ROWS_AT_ONCE, whole)
            words = found[begin * _ROW_BYTES : end * _ROW_BYTES].view("<u4")
            total += self._sum(words.reshape(-1, ROW_WORDS), rows[2 + begin : 2 + end])
        if count > 1 + whole:
            last = _padded(found[whole * _ROW_BYTES :])
            total += self._sum(last, rows[2 + whole : 3 + whole])
        return int(total[0])

    def _sum(self, words: npt.NDArray[np.uint32], rows: _Words) -> np.uint64:
        each = np.einsum("tj,j->t", words, self._columns) >> np.uint64(32)
        found: np.uint64 = (each * rows).sum(dtype=np.uint64)
        return found


def _padded(found: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """A row of words that begins with these bytes."""
    row = np.zeros(_ROW_BYTES, np.uint8)
    row[: len(found)] = found[:_ROW_BYTES]
    return row.view("<u4")[None]


def _numbers(of: bytes, count: int) -> _Words:
    """The first so many numbers that come of some bytes, by SHAKE-128."""
    return np.frombuffer(hashlib.shake_128(of).digest(8 * count), "<u8")
