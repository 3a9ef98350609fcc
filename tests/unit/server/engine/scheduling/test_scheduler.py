"""What the torch thread runs next, decided without one."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable

import pytest

from swarm_notebook.errors import ServerBusy
from swarm_notebook.server.engine.scheduling import scheduler
from swarm_notebook.server.engine.scheduling.scheduler import (
    Admission,
    ChunkSizer,
    Kind,
    Schedule,
    Task,
)

GROUP = ((0, 5), None)


def step(client: str, tokens: int = 1, group: object = GROUP) -> Task:
    return Task(Kind.STEP, client, tokens, group)


def filled(*tasks: Task) -> Schedule[Task]:
    made: Schedule[Task] = Schedule()
    for task in tasks:
        made.add(task, task)
    return made


def clients(taken: list[tuple[Task, Task]]) -> list[str]:
    return [task.client for task, _ in taken]


def run(
    made: Schedule[Task], seconds: Callable[[Task], float], until: float, again: bool = True
) -> Counter:
    """Take and run for a time; what has run comes again at once. Seconds by kind and client."""
    used: Counter = Counter()
    while used.total() < until and made:
        taken = [task for task, _ in made.take()]
        made.ran(taken, seconds(taken[0]))
        for task in taken:
            used[task.kind, task.client] += seconds(taken[0]) / len(taken)
            if again:
                made.add(task, task)
    return used


def test_steps_of_one_group_run_as_one() -> None:
    other, alone = step("d", group="other"), step("e", group=None)
    made = filled(step("a"), step("b"), other, alone, step("c"), step("a"))
    assert clients(made.take()) == ["a", "b", "c", "a"]
    assert clients(made.take()) == ["d"]
    assert clients(made.take()) == ["e"]
    assert len(made) == 0


def test_a_batch_is_bounded_and_the_rest_is_next() -> None:
    half = scheduler.BATCH_TOKENS // 2
    made = filled(step("a", half), step("b", half), step("c", half))
    assert clients(made.take()) == ["a", "b"]
    made.ran([step("a", half), step("b", half)], 1.0)
    made.add(step("a", half), step("a", half))
    assert clients(made.take()) == ["c", "a"]


def test_a_client_with_a_thousand_sessions_does_not_push_another_one_out() -> None:
    made = filled(*[step("many") for _ in range(1000)], step("one"))
    for _ in range(20):
        taken = [task for task, _ in made.take()]
        assert len(taken) == scheduler.BATCH_TOKENS
        assert "one" in {task.client for task in taken}
        made.ran(taken, 0.05)
        for task in taken:
            made.add(task, task)


def test_decoders_go_on_during_a_prefill_and_a_backward() -> None:
    def seconds(task: Task) -> float:
        return {Kind.STEP: 0.02, Kind.PREFILL_CHUNK: 0.1, Kind.STATELESS: 1.0}[task.kind]

    piece, backward = Task(Kind.PREFILL_CHUNK, "long", 64), Task(Kind.STATELESS, "trains", 512)
    used = run(filled(step("decodes"), piece, backward), seconds, until=300)
    shares = [
        used[Kind.STEP, "decodes"],
        used[Kind.PREFILL_CHUNK, "long"],
        used[Kind.STATELESS, "trains"],
    ]
    assert [round(share / 300 * 7) for share in shares] == [4, 2, 1]


def test_nothing_waits_while_nobody_decodes() -> None:
    """Steps that come back late find the piece running, not the thread idle."""
    made = filled(Task(Kind.PREFILL_CHUNK, "long", 64))
    for _ in range(5):
        assert clients(made.take()) == ["long"]
        made.ran([Task(Kind.PREFILL_CHUNK, "long", 64)], 0.1)
        made.add(step("decodes"), step("decodes"))
        made.add(Task(Kind.PREFILL_CHUNK, "long", 64), Task(Kind.PREFILL_CHUNK, "long", 64))
        assert clients(made.take()) == ["decodes"]
        made.ran([step("decodes")], 0.02)


def test_clients_share_passes_alike() -> None:
    made = filled(*[Task(Kind.STATELESS, "many") for _ in range(10)], Task(Kind.STATELESS, "few"))
    order = []
    for _ in range(3):
        taken = [task for task, _ in made.take()]
        made.ran(taken, 1.0)
        order += [task.client for task in taken]
    assert order == ["many", "few", "many"]
    heavy, light = Task(Kind.STATELESS, "heavy", 1000), Task(Kind.STATELESS, "light", 10)
    used = run(filled(heavy, light), lambda task: task.tokens / 100, until=1000)
    assert used[Kind.STATELESS, "light"] == pytest.approx(500, rel=0.05)


def test_who_was_away_comes_back_without_savings() -> None:
    made = filled(Task(Kind.STATELESS, "busy"))
    run(made, lambda _: 1.0, until=100)
    for _ in range(20):
        made.add(Task(Kind.STATELESS, "back"), Task(Kind.STATELESS, "back"))
    used = run(made, lambda _: 1.0, until=10, again=True)
    assert 4 <= used[Kind.STATELESS, "back"] <= 6


def test_clients_that_left_are_forgotten() -> None:
    made: Schedule[Task] = Schedule()
    for number in range(1000):
        made.add(step(f"client {number}"), step(f"client {number}"))
        made.ran([task for task, _ in made.take()], 0.01)
    assert not made._by_kind[Kind.STEP].shares._used
    assert not made._kinds._used


def test_passes_are_bounded_for_one_and_for_all() -> None:
    admission, mine = Admission(), Task(Kind.STATELESS, "mine")
    for _ in range(scheduler.CLIENT_PASSES):
        admission.enter(mine)
    with pytest.raises(ServerBusy, match=r"64 requests of this peer"):
        admission.enter(mine)
    admission.enter(step("mine"))
    admission.enter(scheduler.UPKEEP)
    admission.leave(mine)
    admission.enter(mine)
    for number in range(scheduler.PASSES - scheduler.CLIENT_PASSES):
        admission.enter(Task(Kind.STATELESS, f"other {number}"))
    with pytest.raises(ServerBusy, match=r"0 requests of this peer and 256 of all"):
        admission.enter(Task(Kind.STATELESS, "late"))


def test_nothing_is_waited_for_that_could_not_be_joined() -> None:
    assert filled(step("a"), step("b")).batchable == 2
    assert filled(step("a"), step("b", group="other")).batchable == 0
    assert filled(step("a", group=None)).batchable == 0
    assert filled(step("a"), Task(Kind.PREFILL_CHUNK, "b", 50)).batchable == 0


def test_pieces_are_as_long_as_their_time() -> None:
    chunks = ChunkSizer()
    assert chunks.size(0.06) == scheduler.FIRST_CHUNK
    for _ in range(30):
        chunks.ran(100, 0.1)
    assert chunks.size(0.06) == 60
    assert chunks.size(0.5) == 500
    for _ in range(30):
        chunks.ran(100, 1.0)
    assert chunks.size(0.06) == scheduler.MIN_CHUNK
    for _ in range(30):
        chunks.ran(100_000, 0.1)
    assert chunks.size(0.06) == scheduler.MAX_CHUNK


def test_pieces_take_as_long_as_they_are_to_where_some_are_held_up() -> None:
    """Every second one, on a busy machine; the mean of rates would be that of the quick ones."""
    chunks = ChunkSizer()
    for seconds in (0.19, 0.01) * 30:
        chunks.ran(100, seconds)
        tokens = chunks.size(0.06)
    # A token takes a millisecond on average.
    assert 45 < tokens < 75


def test_chunks_do_not_shrink_where_they_take_as_long_however_small() -> None:
    """As on a card: 25 ms, and 30 us for a token; somebody beside it decodes every 10 ms."""
    chunks = ChunkSizer()
    sizes = []
    for _ in range(40):
        sizes.append(chunks.size(0.01))
        chunks.ran(sizes[-1], 0.025 + 30e-6 * sizes[-1])
    assert min(sizes[5:]) > 250
    assert max(sizes) < 600  # 43 ms
    for _ in range(2):  # alone again: step by step
        size = chunks.size(0.06)
        chunks.ran(size, 0.025 + 30e-6 * size)
    assert chunks.size(0.06) > 900


def test_chunks_are_short_where_short_ones_are_quick() -> None:
    """As on a CPU: 3 ms, and 1 ms for a token."""
    chunks = ChunkSizer()
    for _ in range(40):
        size = chunks.size(0.06)
        chunks.ran(size, 0.003 + 0.001 * size)
    assert 50 <= chunks.size(0.06) <= 60
    assert chunks.size(0.01) == scheduler.MIN_CHUNK


@pytest.mark.parametrize("seed", range(5))
def test_noise_makes_no_chunk_long(seed: int) -> None:
    """On a CPU, with the ends of prompts, which are of any size."""
    chunks, noise = ChunkSizer(), random.Random(seed)
    sizes = []
    for _ in range(500):
        sizes.append(size := chunks.size(0.06))
        if noise.random() < 0.2:
            size = noise.randint(1, size)
        chunks.ran(size, (0.003 + 0.001 * size) * noise.choice((0.3, 1, 1, 1, 3)))
    assert statistics.median(sizes) > 35
    assert max(sizes) < 400


def test_who_waits_besides() -> None:
    made = filled(step("a"), Task(Kind.STATELESS, "a"))
    assert made.has_others("b")
    assert not made.has_others("a")
    made.add(Task(Kind.PREFILL_CHUNK, "b"), Task(Kind.PREFILL_CHUNK, "b"))
    assert made.has_others("a")
