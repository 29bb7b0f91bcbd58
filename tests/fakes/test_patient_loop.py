"""The event loop of the tests: a stall is no timeout, and a wait lasts as long as it was asked to."""

from __future__ import annotations

import asyncio
import time

from tests.fakes.patient_loop import PatientLoop


async def answer_after_a_stall(answered: asyncio.Event) -> None:
    await asyncio.sleep(0.02)
    time.sleep(0.3)  # noqa: ASYNC251 - the stall
    await asyncio.sleep(0.02)
    answered.set()


async def test_a_timeout_does_not_strike_before_the_answer_that_a_stall_held_up() -> None:
    answered = asyncio.Event()
    answering = asyncio.create_task(answer_after_a_stall(answered))
    await asyncio.wait_for(answered.wait(), timeout=0.2)
    await answering


async def test_a_stall_inside_a_wait_does_not_count() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, PatientLoop)
    loop.count()
    start_s = loop.time()
    time.sleep(0.2)  # noqa: ASYNC251 - as if a wait of .05 seconds had taken .2
    loop.count(waited_s=0.05)
    assert 0.05 <= loop.time() - start_s < 0.2


async def test_nothing_wakes_early() -> None:
    start_s = time.monotonic()
    await asyncio.sleep(0.05)
    assert time.monotonic() - start_s >= 0.05 - time.get_clock_info("monotonic").resolution
