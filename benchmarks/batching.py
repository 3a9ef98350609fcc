"""Many sessions at once against one; prints one JSON line of ratios.

    python benchmarks/batching.py [--threads N] [--sessions N] [--only generate blocks idle]

`generate`: the demo model over two servers. Notebooks that generate together, each with its own
embeddings and head, against one of them, and against all of them one after another. They are
threads of this process, so that their heads take the cores that the servers would have; a class has
machines of its own.
`blocks`: the same without the notebooks' part: sessions that send hidden states and wait for the
last block's output. `server_cpu` compares the processor time of the servers per token, which other
work on the machine does not change much.
`idle`: one server, 64 sessions, each idle nine tenths of the time: step times, for the first crowd
that a server sees and for a later one, and the memory that is taken of the pool.

All outputs are compared with those of the session alone. About two minutes on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bare import STEPS, BareSession, check, cpu_seconds, server_facts
from common import be_quiet, demo_swarm, report, summary

PROMPTS = [
    "The history of the lighthouse begins with a storm",
    "Bread rises because",
    "In the year 1912 the ship",
    "A good teacher knows",
    "The sum of two odd numbers is",
    "Once upon a time there was a fox who",
    "To plant a tree you need",
    "The moon is far away, but",
]
NEW_TOKENS = 48
REPEATS = 3
IDLE_SESSIONS, IDLE_STEPS = 64, 30
IDLE_TIMES = 9


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Clock:
    """A stopping criterion that stops nothing and notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        self.times.append(time.perf_counter())
        return input_ids.new_zeros(len(input_ids), dtype=bool)

    @property
    def steps(self) -> list[float]:
        """Seconds of every token but the first, which waits for the prefill."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def generate(threads: int, sessions: int) -> dict[str, Any]:
    """Notebooks that generate together."""
    import torch

    torch.set_num_threads(threads)
    with demo_swarm(threads) as (_, swarm):
        prompts = [PROMPTS[number % len(PROMPTS)] for number in range(sessions)]
        inputs = [swarm.tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

        def run(number: int, clock: Clock | None = None) -> list[list[int]]:
            criteria = [clock or Clock()]
            made = swarm.model.generate(**inputs[number], **options, stopping_criteria=criteria)
            tokens: list[list[int]] = made.tolist()
            return tokens

        def measured(numbers: list[int], how: Any) -> tuple[list[list[list[int]]], float, Any]:
            """The tokens, the seconds of all, the seconds of every step."""
            clocks = [Clock() for _ in numbers]
            began = time.perf_counter()
            tokens = list(how(run, numbers, clocks))
            took = time.perf_counter() - began
            return tokens, took, [step for clock in clocks for step in clock.steps]

        everybody = list(range(sessions))
        run(0)  # warm-up
        alone_tokens, after, _ = measured(everybody, map)
        one, together = [], []
        steps: dict[str, list[float]] = {"alone": [], "together": []}
        with ThreadPoolExecutor(sessions) as pool:
            measured(everybody, pool.map)  # servers choose kernels (`products.kernels`)
            for repeat in range(REPEATS):
                _, took, found = measured([repeat % sessions], map)
                one.append(took)
                steps["alone"] += found
                tokens, took, found = measured(everybody, pool.map)
                if tokens != alone_tokens:
                    raise SystemExit("together and alone, tokens differ: a speed is meaningless")
                together.append(took)
                steps["together"] += found
    single = statistics.median(one)
    return {
        "one_tokens_per_s": round(NEW_TOKENS / single, 1),
        "together_tokens_per_s": round(sessions * NEW_TOKENS / statistics.median(together), 1),
        "times_one": round(sessions * single / statistics.median(together), 2),
        "times_one_after_another": round(after / statistics.median(together), 2),
        "goal": 4,
        **{
            f"step_ms_{name}": {
                "median": round(1000 * statistics.median(found), 1),
                "p99": round(1000 * quantile(found, 0.99), 1),
            }
            for name, found in steps.items()
        },
    }


def blocks(threads: int, sessions: int) -> dict[str, Any]:
    """Sessions without their notebooks."""
    with demo_swarm(threads) as (servers, swarm):
        connection, size = swarm.connection, swarm.model.config.hidden_size

        def fresh(number: int) -> list[BareSession]:
            return [BareSession(connection, size, seed) for seed in range(number)]

        async def alone(made: list[BareSession]) -> None:
            for session in made:
                await session.prefill()
                await session.run(STEPS)

        async def together(made: list[BareSession]) -> float:
            await asyncio.gather(*(session.prefill() for session in made))
            began = time.perf_counter()
            await asyncio.gather(*(session.run(STEPS) for session in made))
            return time.perf_counter() - began

        crowd, single, joint = (fresh(sessions) for _ in range(3))
        ratios: list[float] = []
        connection.network.run(together(crowd))
        for session in crowd:
            session.close()
        connection.network.run(alone(single))
        before = server_facts(swarm)
        cpu: list[float] = []
        for _ in range(REPEATS):
            again = fresh(1)
            marks = [cpu_seconds(servers)]
            connection.network.run(alone(again))
            marks.append(cpu_seconds(servers))
            took = connection.network.run(together(joint))
            marks.append(cpu_seconds(servers))
            check(joint, single)
            ratios.append(sessions * sum(again[0].seconds) / took)
            cpu.append(sessions * (marks[1] - marks[0]) / (marks[2] - marks[1]))
            for session in (*again, *joint):
                session.close()
            joint = fresh(sessions)
        after = server_facts(swarm)
    calls = after["step_calls"] - before["step_calls"] - REPEATS * STEPS
    return {
        "times_one": round(statistics.median(ratios), 2),
        "server_cpu": round(statistics.median(cpu), 2),
        "steps_per_call": round(REPEATS * sessions * STEPS / calls, 2),
    }


def idle(threads: int, sessions: int) -> dict[str, Any]:
    """A class of students who mostly read."""
    with demo_swarm(threads, servers=1) as (_, swarm):
        connection, size = swarm.connection, swarm.model.config.hidden_size
        dice = random.Random(0)

        def fresh() -> list[BareSession]:
            return [BareSession(connection, size, seed) for seed in range(sessions)]

        async def student(session: BareSession) -> None:
            took = await session.step()
            for _ in range(IDLE_STEPS - 1):
                # Idle nine tenths of the time, and not in step with the others.
                await asyncio.sleep(took * IDLE_TIMES * dice.uniform(0.5, 1.5))
                took = await session.step()

        async def all_of_them(made: list[BareSession]) -> None:
            for session in made:
                await session.prefill()
            await asyncio.gather(*map(student, made))

        # The first crowd of a server is there while it chooses kernels (`products.kernels`).
        crowd, made = fresh(), fresh()
        connection.network.run(all_of_them(crowd))
        for session in crowd:
            session.close()
        before = server_facts(swarm)
        connection.network.run(all_of_them(made))
        facts = server_facts(swarm)
        alone = [BareSession(connection, size, seed) for seed in range(2)]

        async def check_some() -> None:
            for session in alone:
                await session.prefill()
                await session.run(IDLE_STEPS)

        connection.network.run(check_some())
        check(made[: len(alone)], alone)
    return {
        "served": sum(len(session.seconds) == IDLE_STEPS for session in made),
        "of": sessions,
        "first_crowd": _step_times(crowd),
        **_step_times(made),
        "goal_p99_times_median": 3,
        "cache_tokens_taken": facts["cache_tokens_total"] - facts["cache_tokens_free"],
        "cache_tokens_total": facts["cache_tokens_total"],
        "steps_per_call": round(
            (facts["steps"] - before["steps"]) / (facts["step_calls"] - before["step_calls"]), 2
        ),
    }


def _step_times(crowd: list[BareSession]) -> dict[str, float]:
    seconds = [second for session in crowd for second in session.seconds[1:]]
    median, p99 = statistics.median(seconds), quantile(seconds, 0.99)
    return {
        "step_ms_median": round(1000 * median, 1),
        "step_ms_p99": round(1000 * p99, 1),
        "p99_times_median": round(p99 / median, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("--threads", type=int, default=1, help="per process (default: 1)")
    parser.add_argument("--sessions", type=int, default=8, help="that run together (default: 8)")
    parser.add_argument("--only", nargs="+", choices=["generate", "blocks", "idle"])
    options = parser.parse_args()
    be_quiet(options.threads)
    parts = {
        "generate": lambda: generate(options.threads, options.sessions),
        "blocks": lambda: blocks(options.threads, options.sessions),
        "idle": lambda: idle(options.threads, IDLE_SESSIONS),
    }
    report(options, parts, sessions=options.sessions)


if __name__ == "__main__":
    main()
