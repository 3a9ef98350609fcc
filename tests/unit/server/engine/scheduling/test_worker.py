"""The torch thread: order, results, errors, and what becomes of cancelled jobs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest

from swarm_notebook.server.engine.scheduling.worker import ComputeThread


def in_loop(work: Callable[[ComputeThread], Awaitable[None]]) -> None:
    async def main() -> None:
        compute = ComputeThread()
        try:
            await work(compute)
        finally:
            compute.stop()

    asyncio.run(main())


def test_jobs_run_in_order_in_one_thread_of_their_own() -> None:
    async def work(compute: ComputeThread) -> None:
        jobs = [compute.submit(lambda n: (n, threading.get_ident()), n) for n in range(5)]
        results = [await job.future for job in jobs]
        assert [number for number, _ in results] == list(range(5))
        assert len({thread for _, thread in results} - {threading.get_ident()}) == 1

    in_loop(work)


def test_an_error_belongs_to_its_job_alone() -> None:
    async def work(compute: ComputeThread) -> None:
        failing, working = compute.submit(lambda: 1 // 0), compute.submit(lambda: 2)
        with pytest.raises(ZeroDivisionError):
            await failing.future
        assert await working.future == 2

    in_loop(work)


def test_a_thread_without_memory_goes_on_and_nobody_waits_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it fails before a job, which hears of it, or behind one, which has its result."""

    def fail(*_: object) -> NoReturn:
        raise MemoryError

    async def work(compute: ComputeThread) -> None:
        compute.on_ran = fail
        assert await compute.submit(lambda: 1).future == 1
        with monkeypatch.context() as patched:
            patched.setattr(compute, "_room", fail)
            with pytest.raises(MemoryError):
                await compute.submit(lambda: 2).future
        assert await compute.submit(lambda: 3).future == 3

    in_loop(work)


def test_a_job_cancelled_in_the_queue_never_runs() -> None:
    async def work(compute: ComputeThread) -> None:
        begun, gate = threading.Event(), threading.Event()
        ran: list[str] = []
        settled: list[str] = []
        running = compute.submit(lambda: begun.set() or gate.wait())
        await asyncio.to_thread(begun.wait)
        queued = compute.submit(lambda: ran.append("queued"))
        queued.cancel()
        queued.on_settled(lambda: settled.append("queued"))
        assert settled == ["queued"]
        running.cancel()
        running.on_settled(lambda: settled.append("running"))
        assert settled == ["queued"]
        gate.set()
        await compute.submit(lambda: None).future
        assert settled == ["queued", "running"]
        assert ran == []

    in_loop(work)
