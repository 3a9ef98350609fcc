"""How long silence is borne, by how a server has answered before."""

from __future__ import annotations

import asyncio
import time

from swarm_notebook.client.servers.detector import LEAST_SECONDS, FailureDetector

PEER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


async def nobody(_peer: str) -> bool:
    await asyncio.sleep(60)
    return False


def detector_after(*seconds: float) -> FailureDetector:
    detector = FailureDetector(nobody)
    for one in seconds:
        detector.answered(PEER, one)
    return detector


def test_a_near_server_is_missed_soon_and_a_far_one_is_given_its_time() -> None:
    assert FailureDetector(nobody).borne(PEER) is None
    assert detector_after(*[0.001] * 20).borne(PEER) == LEAST_SECONDS
    far = detector_after(0.6, 0.9, 0.7, 1.0, 0.6, 0.9).borne(PEER)
    assert far is not None
    assert far > 1.0


def test_late_answers_double_what_is_borne_and_prompt_ones_undo_that() -> None:
    detector = detector_after(*[0.001] * 20)
    once = LEAST_SECONDS
    for _ in range(2):
        detector.answered(PEER, 60.0)
        late = detector.borne(PEER)
        assert late is not None
        assert 1.5 * once < late < 2.5 * once
        once = late
    for _ in range(16):
        detector.answered(PEER, 0.001)
    assert (detector.borne(PEER) or 0) < 1.5 * LEAST_SECONDS


def test_those_who_ask_at_once_share_a_ping_that_goes_on() -> None:
    pings: list[str] = []
    answered = asyncio.Event()

    async def ping(peer: str) -> bool:
        pings.append(peer)
        await answered.wait()
        return True

    async def main() -> None:
        detector = FailureDetector(ping)
        waits = [detector.is_there(PEER, lambda: 0.05) for _ in range(3)]
        assert await asyncio.gather(*waits) == [False, False, False]
        answered.set()
        assert await detector.is_there(PEER, lambda: 60)
        assert pings == [PEER]
        assert await detector.is_there(PEER, lambda: 60)
        assert len(pings) == 2

    asyncio.run(main())


def test_silence_is_borne_no_longer_once_others_have_come() -> None:
    async def main() -> None:
        detector, borne = FailureDetector(nobody), [3600.0]
        asking = asyncio.ensure_future(detector.is_there(PEER, lambda: borne[0]))
        await asyncio.sleep(0.05)
        assert not asking.done()
        borne[0] = 0.0
        assert not await asking
        detector.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_notebook_that_slept_misses_nobody_for_it() -> None:
    async def ping(_peer: str) -> bool:
        await asyncio.sleep(0.75)
        return True

    async def main() -> None:
        detector = FailureDetector(ping)
        asking = asyncio.ensure_future(detector.is_there(PEER, lambda: 0.2))
        await asyncio.sleep(0.1)
        # The loop does not run, as while a laptop sleeps.
        time.sleep(0.6)  # noqa: ASYNC251
        assert await asking

    asyncio.run(main())


def test_a_notebook_that_is_always_held_up_does_not_wait_for_ever() -> None:
    async def main() -> None:
        detector = FailureDetector(nobody)
        asking = asyncio.ensure_future(detector.is_there(PEER, lambda: 0.01))
        while not asking.done():
            time.sleep(0.3)  # noqa: ASYNC251
            await asyncio.sleep(0.01)
        assert not await asking
        detector.stop()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_who_is_missed_is_asked_again_until_it_is_back() -> None:
    async def main() -> None:
        back = asyncio.Event()

        async def ping(_peer: str) -> bool:
            back.set()
            return True

        asking = asyncio.create_task(FailureDetector(ping).keep_asking(lambda: [PEER]))
        async with asyncio.timeout(30):
            await back.wait()
        asking.cancel()

    asyncio.run(main())
