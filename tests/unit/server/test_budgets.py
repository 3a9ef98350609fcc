"""Decisions about what a server keeps for notebooks: pure, without a server."""

from __future__ import annotations

import pytest

from swarm_notebook.errors import BadRequest, CacheFull
from swarm_notebook.server.adapters.store import IDLE_SECONDS, AdapterLimits, AdapterStore
from swarm_notebook.server.engine.passes.activation_store import KEEP_SECONDS, ActivationStore


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def activations(total: int = 100) -> tuple[ActivationStore[str], Clock]:
    clock = Clock()
    return ActivationStore(total, clock), clock


def of(name: str, peer: str = "one") -> tuple[str, str]:
    return peer, name


def test_the_least_recently_used_activations_go_first() -> None:
    kept, _ = activations()
    for name in "abc":
        kept.put(of(name), name.upper(), 30)
    assert kept.get(of("a")) == "A"
    kept.put(of("d"), "D", 30)
    assert [kept.get(of(name)) for name in "abcd"] == ["A", None, "C", "D"]
    assert kept.held == 90


def test_nobody_drives_out_activations_of_who_holds_less() -> None:
    kept, _ = activations()
    kept.put(of("a", "little"), "A", 20)
    for name in "bcdefgh":
        kept.put(of(name, "much"), name.upper(), 20)
    assert [kept.get(of(name, "much")) for name in "bcdefgh"] == [*[None] * 3, *"EFGH"]
    assert kept.get(of("a", "little")) == "A"
    kept.put(of("z", "little"), "Z", 30)  # it holds 50 then, as much as the other at most
    assert [kept.get(of(name, "much")) for name in "efgh"] == [None, None, "G", "H"]
    assert kept.held == 90
    kept.put(of("large", "much"), "L", 90)  # more than is left to it, whatever it gives up
    assert kept.get(of("large", "much")) is None
    assert [kept.get(of(name, "little")) for name in "az"] == ["A", "Z"]


def test_activations_beyond_the_budget_are_not_kept_and_drive_nobody_out() -> None:
    kept, _ = activations()
    kept.put(of("a"), "A", 60)
    kept.put(of("large"), "L", 101)
    assert (kept.get(of("a")), kept.get(of("large")), kept.held) == ("A", None, 60)
    assert not kept.make_room("one", 101)
    assert kept.make_room("one", 100)
    assert kept.held == 0


def test_activations_grow_old() -> None:
    kept, clock = activations()
    kept.put(of("old"), "O", 10)
    kept.put(of("used"), "U", 10)
    clock.now += KEEP_SECONDS / 2
    assert kept.get(of("used")) == "U"
    clock.now += KEEP_SECONDS / 2
    kept.expire()
    assert (kept.held, kept.get(of("used")), kept.get(of("old"))) == (10, "U", None)


def test_activations_are_replaced_and_dropped_by_what_they_are() -> None:
    kept, _ = activations()
    kept.put(of("a"), "A", 40)
    kept.put(of("a"), "B", 50)
    assert (kept.held, kept.get(of("a"))) == (50, "B")
    kept.put(of("c"), "C", 20)
    kept.remove_if(lambda key, value: value == "B")
    assert (kept.held, kept.get(of("a")), kept.get(of("c"))) == (20, None, "C")


LIMITS = AdapterLimits(bytes=100, number=3)


def adapters() -> tuple[AdapterStore[str], Clock]:
    clock = Clock()
    return AdapterStore(LIMITS, clock), clock


def load(store: AdapterStore[str], peer: str, name: str, size: int) -> None:
    store.make_room((peer, name), size)
    store.put((peer, name), f"{peer}/{name}", size)


def test_adapters_of_the_same_id_belong_to_their_peers() -> None:
    store, _ = adapters()
    load(store, "alice", "default", 10)
    load(store, "bob", "default", 10)
    assert store.get(("alice", "default")) == "alice/default"
    assert store.get(("bob", "default")) == "bob/default"
    assert store.get(("carol", "default")) is None


def test_a_peers_new_adapter_drives_out_its_own_by_number_and_by_size() -> None:
    store, _ = adapters()
    load(store, "bob", "b", 90)
    for name in "xyz":
        load(store, "alice", name, 10)
    store.get(("alice", "x"))
    load(store, "alice", "w", 10)
    assert [name for name in "xyzw" if store.get(("alice", name))] == ["x", "z", "w"]
    load(store, "alice", "v", 85)
    assert [name for name in "xzwv" if store.get(("alice", name))] == ["w", "v"]
    assert store.get(("bob", "b"))
    assert store.held == 90 + 10 + 85


def test_an_adapter_is_replaced_in_its_own_room() -> None:
    store, _ = adapters()
    load(store, "alice", "a", 90)
    load(store, "alice", "a", 100)
    assert store.held == 100
    with pytest.raises(BadRequest, match="takes 101 bytes, this server accepts 100"):
        load(store, "alice", "a", 101)
    assert store.get(("alice", "a"))


def test_others_adapters_go_only_when_they_are_idle() -> None:
    store, clock = adapters()
    for peer in "abcd":
        load(store, peer, "one", 100)
    with pytest.raises(CacheFull, match="no room"):
        load(store, "e", "one", 50)
    assert store.held == LIMITS.total
    clock.now += IDLE_SECONDS
    store.get(("a", "one"))
    load(store, "e", "one", 50)
    assert [peer for peer in "abcde" if store.get((peer, "one"))] == ["a", "c", "d", "e"]
