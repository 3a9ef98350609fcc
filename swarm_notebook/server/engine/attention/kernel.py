"""Attention of one new position per row, read straight from pages: three Triton kernels.

The arithmetic of `paged` gathers a row's keys and values first, which costs more than reading them:
on an H100, 32 rows of 512 positions through 32 blocks of an 8B Llama, 5.1 of 15.4 ms per step, and
nine small kernels per block besides. Here each program reads one head's pages of one row, piece by
piece, with a running maximum and sum (Milakov, Gimelshein 2018; Dao et al. 2022). Where rows and
heads alone leave the card idle, a row's pages are shared out to several programs (*splits*), whose
results are put together after it. How many there are follows from the bucket alone, so a row's bits
do not depend on its company.

What a row must not see is not read, whatever stands there. Triton comes with torch for GPUs; where
it is missing, or cannot compile, steps run by `paged` (see `steps.decode`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from swarm_notebook.server.engine import card_kernel
from swarm_notebook.server.engine.card_kernel import wait_and_be_followed
from swarm_notebook.server.engine.kv.cache import PAGE

# Programs per multiprocessor that keep a card's memory busy.
_FILL = 2
# Rows of a matrix that tensor cores multiply at least.
_LEAST_GROUPS = 16
_LOWEST = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["lines", "key_row", "key_head", "value_row", "value_head"])
def _file(
    new_keys,
    new_values,
    keys,
    values,
    places,
    place_row,
    lines,
    key_row,
    key_head,
    value_row,
    value_head,
    KEY: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """File the new key and value of one head of one row."""
    wait_and_be_followed(FOLLOWS)
    row, head = tl.program_id(0), tl.program_id(1)
    line = tl.load(places + row * place_row) + head.to(tl.int64) * lines
    at = tl.arange(0, KEY_PAD)
    key = tl.load(new_keys + row * key_row + head * key_head + at, mask=at < KEY)
    tl.store(keys + line * KEY + at, key, mask=at < KEY)
    at = tl.arange(0, VALUE_PAD)
    value = tl.load(new_values + row * value_row + head * value_head + at, mask=at < VALUE)
    tl.store(values + line * VALUE + at, value, mask=at < VALUE)


@triton.jit(
    do_not_specialize=["lines", "pages", "pages_each", "splits", "table_row", "position_row"]
)
def _attend(
    query,
    keys,
    values,
    table,
    positions,
    seen,
    sums,
    tops,
    totals,
    query_row,
    query_head,
    table_row,
    position_row,
    seen_row,
    lines,
    pages,
    pages_each,
    splits,
    scaling,
    softcap,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    CAPPED: tl.constexpr,
    SIZE: tl.constexpr,
    KEY: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """One split of a row's pages, for the queries that share a head of keys."""
    wait_and_be_followed(FOLLOWS)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups, at_key = tl.arange(0, GROUPS_PAD), tl.arange(0, KEY_PAD)
    at_value, within = tl.arange(0, VALUE_PAD), tl.arange(0, SIZE)
    asking = query + row * query_row + (head * GROUPS + groups)[:, None] * query_head
    q = tl.load(
        asking + at_key[None], mask=(groups < GROUPS)[:, None] & (at_key < KEY)[None], other=0.0
    )
    top = tl.full([GROUPS_PAD], _LOWEST, tl.float32)
    total = tl.zeros([GROUPS_PAD], tl.float32)
    summed = tl.zeros([GROUPS_PAD, VALUE_PAD], tl.float32)
    first = head.to(tl.int64) * lines
    begin = split * pages_each
    # Buckets double: without it rows of them would be asked for up to twice as much.
    pages = tl.minimum(pages, tl.load(positions + row * position_row) // SIZE + 1)
    for page in range(begin, tl.minimum(begin + pages_each, pages)):
        line = first + tl.load(table + row * table_row + page) * SIZE + within
        sees = tl.load(seen + row * seen_row + page * SIZE + within) != 0
        k = tl.load(
            keys + line[:, None] * KEY + at_key[None],
            mask=sees[:, None] & (at_key < KEY)[None],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            # The hyperbolic tangent.
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(sees[None], scores, _LOWEST)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(sees[None], tl.exp(scores - higher[:, None]), 0.0)
        faded = tl.exp(top - higher)
        v = tl.load(
            values + line[:, None] * VALUE + at_value[None],
            mask=sees[:, None] & (at_value < VALUE)[None],
            other=0.0,
        )
        total = total * faded + tl.sum(weights, 1)
        summed = summed * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    place = ((row * tl.num_programs(1) + head) * GROUPS + groups) * splits + split
    tl.store(tops + place, top, mask=groups < GROUPS)
    tl.store(totals + place, total, mask=groups < GROUPS)
    tl.store(
        sums + place[:, None] * VALUE + at_value[None],
        summed,
        mask=(groups < GROUPS)[:, None] & (at_value < VALUE)[None],
    )


@triton.jit(do_not_specialize=["splits"])
def _join(
    sums,
    tops,
    totals,
    sinks,
    output,
    splits,
    SINKS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """Put the splits of one query together."""
    wait_and_be_followed(FOLLOWS)
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = tl.arange(0, VALUE_PAD)
    summed = tl.zeros([VALUE_PAD], tl.float32)
    if SINKS:
        top = tl.zeros([1], tl.float32) + tl.load(sinks + head).to(tl.float32)
        total = tl.full([1], 1.0, tl.float32)
    else:
        top = tl.full([1], _LOWEST, tl.float32)
        total = tl.zeros([1], tl.float32)
    for split in range(splits):
        place = (row * heads + head) * splits + split
        found = tl.load(tops + place)
        higher = tl.maximum(top, found)
        faded, share = tl.exp(top - higher), tl.exp(found - higher)
        total = total * faded + tl.load(totals + place) * share
        summed = summed * faded + share * tl.load(sums + place * VALUE + at, mask=at < VALUE)
        top = higher
    # A row that sees nothing is nobody's, and must stay finite.
    result = summed / tl.maximum(total, 1e-30)
    target = output + (row * heads + head) * VALUE + at
    tl.store(target, result.to(output.dtype.element_ty), mask=at < VALUE)


def file(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """File ``[rows, heads, 1, size]`` in the stores ``[heads, lines, size]``, at a line per row."""
    rows, heads, _, key_size = new_keys.shape
    value_size = new_values.shape[3]
    new_keys, new_values = _dense(new_keys), _dense(new_values)
    _file[rows, heads](
        new_keys,
        new_values,
        keys,
        values,
        places,
        places.stride(0),
        keys.shape[1],
        new_keys.stride(0),
        new_keys.stride(1),
        new_values.stride(0),
        new_values.stride(1),
        KEY=key_size,
        KEY_PAD=_power(key_size),
        VALUE=value_size,
        VALUE_PAD=_power(value_size),
        **card_kernel.following(keys.device),
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    seen: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``[rows, heads, value size]`` for queries ``[rows, heads, 1, size]``.

    Args:
        keys, values: the stores of a block, ``[heads, lines, size]``.
        table: ``[rows, pages]``.
        positions: ``[rows, 1]``, of the queries: what comes behind is not looked at.
        seen: ``[rows, length]``, True where a row sees.
        sinks: ``[heads]``.
    """
    query = _dense(query)
    rows, heads, _, key_size = query.shape
    shared, value_size, pages = keys.shape[0], values.shape[2], table.shape[1]
    groups = heads // shared
    idle = _FILL * card_kernel.multiprocessors(query.device) // (rows * shared)
    each = -(-pages // min(max(idle, 1), pages))
    splits = -(-pages // each)
    options: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    sums = torch.empty(rows, heads, splits, value_size, **options)
    tops, totals = torch.empty(2, rows, heads, splits, **options)
    seen = seen.view(torch.uint8)
    _attend[rows, shared, splits](
        query,
        keys,
        values,
        table,
        positions,
        seen,
        sums,
        tops,
        totals,
        query.stride(0),
        query.stride(1),
        table.stride(0),
        positions.stride(0),
        seen.stride(0),
        keys.shape[1],
        pages,
        each,
        splits,
        float(scaling),
        float(softcap or 0.0),
        GROUPS=groups,
        GROUPS_PAD=max(_LEAST_GROUPS, _power(groups)),
        CAPPED=softcap is not None,
        SIZE=PAGE,
        KEY=key_size,
        KEY_PAD=max(_LEAST_GROUPS, _power(key_size)),
        VALUE=value_size,
        VALUE_PAD=max(_LEAST_GROUPS, _power(value_size)),
        **card_kernel.following(query.device),
    )
    output = torch.empty(rows, heads, value_size, dtype=values.dtype, device=query.device)
    _join[rows, heads](
        sums,
        tops,
        totals,
        sums if sinks is None else sinks,
        output,
        splits,
        SINKS=sinks is not None,
        VALUE=value_size,
        VALUE_PAD=_power(value_size),
        **card_kernel.following(query.device),
    )
    return output


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """With values of one head side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
