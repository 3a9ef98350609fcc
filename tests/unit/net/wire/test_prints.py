"""The print of what travels: the same on every machine, another one for any other bytes."""

from __future__ import annotations

import hashlib
import random

import pytest

from swarm_notebook.net.wire import prints
from swarm_notebook.net.wire.message import PackedTensor

SEED = bytes(range(prints.SEED_BYTES))


HEADER = PackedTensor().header


def as_documented(data: bytes, header: bytes = HEADER) -> int:
    """The print by its definition."""

    def numbers(of: bytes, count: int) -> list[int]:
        found = hashlib.shake_128(of + SEED).digest(8 * count)
        return [int.from_bytes(found[8 * i : 8 * i + 8], "little") for i in range(count)]

    columns = numbers(b"columns", prints.ROW_WORDS)
    size = 4 * prints.ROW_WORDS
    rows = [header.ljust(size, b"\0")]
    rows += [data[i : i + size].ljust(size, b"\0") for i in range(0, len(data), size)]
    factors = numbers(b"rows", len(rows) + 1)
    total = factors[0] * len(data)
    for row, factor in zip(rows, factors[1:], strict=True):
        words = (int.from_bytes(row[4 * j : 4 * j + 4], "little") for j in range(len(columns)))
        of_row = sum(word * column for word, column in zip(words, columns, strict=True))
        total += factor * (of_row % 2**64 >> 32)
    return total % 2**64


@pytest.mark.parametrize("size", [0, 1, 5, 2304, 4096, 4097, 40_000])
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_a_print_is_as_documented(size: int, kind: type) -> None:
    data = random.Random(size).randbytes(size)
    assert prints.printer(SEED).of(PackedTensor(kind(data))) == as_documented(data)


def test_a_large_tensor_is_taken_in_pieces() -> None:
    data = random.Random(0).randbytes(1_500_001)
    assert prints.printer(SEED).of(PackedTensor(data)) == as_documented(data)


def test_any_changed_bit_and_any_other_length_and_order_is_seen() -> None:
    print_of, data = prints.printer(SEED).of, bytearray(random.Random(1).randbytes(9000))
    known = {print_of(PackedTensor(bytes(data)))}
    for bit in range(0, 8 * len(data), 61):
        other = bytearray(data)
        other[bit // 8] ^= 1 << bit % 8
        known.add(print_of(PackedTensor(bytes(other))))
    assert len(known) == 1 + len(range(0, 8 * len(data), 61))
    assert print_of(PackedTensor(bytes(data) + b"\0")) not in known
    assert print_of(PackedTensor(bytes(data[4096:] + data[:4096]))) not in known
    assert prints.printer(prints.new_seed()).of(PackedTensor(bytes(data))) not in known


def test_the_same_bytes_in_another_dtype_or_shape_are_something_else() -> None:
    print_of, data = prints.printer(SEED).of, random.Random(2).randbytes(96)
    told = {
        print_of(PackedTensor(data, size, dtype, compression))
        for size in ((1, 3, 16), (3, 1, 16))
        for dtype in ("bfloat16", "float16")
        for compression in (0, 1)
    }
    assert len(told) == 8
    one = PackedTensor(data, (1, 3, 16), "float16")
    assert print_of(one) == as_documented(data, b"float16 0 [1, 3, 16]")
