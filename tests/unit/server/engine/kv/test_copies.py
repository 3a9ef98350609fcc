"""A session's cache that begins with a copy of another one's."""

from __future__ import annotations

import pytest
import torch

from swarm_notebook.server.engine.kv.cache import PAGE, SessionCache
from swarm_notebook.server.engine.kv.pages import KVShape, PagedCache, PagePool

ROWS, HEADS, SIZE, FIRST = 2, 3, 4, 5
LENGTH = PAGE + 7


def states(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, HEADS, length, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["memory of its own", "pages"])
def caches(request: pytest.FixtureRequest) -> tuple[SessionCache, SessionCache]:
    """Two of blocks 5 and 6."""
    if request.param == "pages":
        shapes = [KVShape(HEADS, SIZE, SIZE)] * 2
        options = {"dtype": torch.float32, "device": torch.device("cpu")}
        pool = PagePool(FIRST, shapes, 12 * PAGE, **options)
        return PagedCache(pool), PagedCache(pool)
    return SessionCache(FIRST, FIRST + 2), SessionCache(FIRST, FIRST + 2)


def filled(cache: SessionCache) -> None:
    cache.restart(ROWS)
    cache.reserve(2 * PAGE)
    for block, length in ((FIRST, LENGTH), (FIRST + 1, 9)):
        cache.update(states(ROWS, length, block), states(ROWS, length, 10 * block), block)


def test_each_goes_its_own_way(caches: tuple[SessionCache, SessionCache]) -> None:
    one, other = caches
    filled(one)
    other.reserve(2 * PAGE)
    other.copy_from(one, LENGTH - 2)
    assert (other.rows, other.lengths(FIRST, FIRST + 2)) == (ROWS, [LENGTH - 2, 9])
    for cache, seed in ((other, 1), (one, 2)):
        new = states(ROWS, 3, seed)
        keys, values = cache.update(new, new, FIRST)
        kept = cache.lengths(FIRST, FIRST + 1)[0] - 3
        assert torch.equal(keys[:, :, :kept], states(ROWS, LENGTH, FIRST)[:, :, :kept])
        assert torch.equal(values[:, :, :kept], states(ROWS, LENGTH, 10 * FIRST)[:, :, :kept])
        assert torch.equal(keys[:, :, kept:], new)
    assert one.lengths(FIRST, FIRST + 1) == [LENGTH + 3]


def test_pages_of_a_copy_come_back(caches: tuple[SessionCache, SessionCache]) -> None:
    one, other = caches
    if not isinstance(one, PagedCache):
        pytest.skip("only pages are given back")
    before = one.pool.free
    filled(one)
    taken = before - one.pool.free
    other.copy_from(one, LENGTH)
    one.release()
    keys, _ = other.update(states(ROWS, 1, 1), states(ROWS, 1, 1), FIRST)
    assert torch.equal(keys[:, :, :LENGTH], states(ROWS, LENGTH, FIRST))
    assert before - other.pool.free <= taken
    other.release()
    assert other.pool.free == before
