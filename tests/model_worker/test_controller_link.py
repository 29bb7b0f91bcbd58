from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import Self

import aiohttp
import pytest

from controller.protocol import PROTOCOL_VERSION, ServedModel, VariantStatus, WorkerStats
from model_worker.controller_link import MAX_RETRY_S, ControllerLink
from registry.errors import PermissionDeniedError, UpstreamError
from tests.fakes.fake_controller import FakeController
from tests.fakes.until import until

MODEL = ServedModel(name="m", family="llama", max_model_len=64, chat=True, dtype="float32")
PIRATE = VariantStatus(name="pirate", parent="m", path="pirate", state="active", rank=8)


class FakeSleep:
    """Returns at once and remembers how long it was asked to sleep."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, delay_s: float) -> None:
        self.slept.append(delay_s)
        await asyncio.sleep(0)


@pytest.fixture
async def controller() -> AsyncIterator[FakeController]:
    async with FakeController(worker_token="secret", heartbeat_interval_s=0.5) as controller:
        yield controller


@pytest.fixture
def sleep() -> FakeSleep:
    return FakeSleep()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def link(controller: FakeController, session: aiohttp.ClientSession, sleep: FakeSleep) -> ControllerLink:
    return make_link(controller.url, session, sleep)


async def report() -> list[VariantStatus]:
    return [PIRATE]


def make_link(
    url: str, session: aiohttp.ClientSession, sleep: FakeSleep, *, worker_token: str | None = "secret"
) -> ControllerLink:
    return ControllerLink(
        session,
        url,
        worker_id="w",
        worker_url="http://here:1",
        worker_token=worker_token,
        models=[MODEL],
        stats=lambda: WorkerStats(num_running=3),
        variants=report,
        sleep=sleep,
        jitter=random.Random(0),
    )


class Running:
    """Runs a link in the background; calling it waits for a condition, and raises what ended the link."""

    def __init__(self, link: ControllerLink) -> None:
        self._link = link

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._link.run())
        return self

    async def __call__(self, condition: Callable[[], object]) -> None:
        await until(lambda: self._task.done() or condition())
        if self._task.done():
            self._task.result()

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def test_registers_and_heartbeats_at_the_controllers_interval(
    link: ControllerLink, controller: FakeController, sleep: FakeSleep
) -> None:
    async with Running(link) as running:
        await running(lambda: len(controller.stats) >= 3)
    registration = controller.workers["w"]
    assert registration.protocol_version == PROTOCOL_VERSION
    assert registration.url == "http://here:1"
    assert registration.models == [MODEL]
    assert registration.stats.num_running == 3
    assert registration.variants.variants == list(controller.variants.values()) == [PIRATE]
    assert registration.variants.since is None
    assert all(report.since is not None and not report.variants for report in controller.reports[1:])
    assert controller.stats[0].num_running == 3
    assert set(sleep.slept) == {0.5}
    assert controller.calls.count("register") == 1


async def test_registers_again_when_the_controller_forgot_it(link: ControllerLink, controller: FakeController) -> None:
    async with Running(link) as running:
        await running(lambda: len(controller.stats) >= 1)
        controller.workers.clear()
        await running(lambda: "w" in controller.workers)
        await running(lambda: controller.calls[-1] == "heartbeat" and link.registered)
    assert controller.calls.count("register") == 2


async def test_registers_again_after_the_controller_was_away(
    link: ControllerLink, controller: FakeController, sleep: FakeSleep, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "model_worker")
    async with Running(link) as running:
        await running(lambda: len(controller.stats) >= 1)
        await controller.stop()
        attempts = len(sleep.slept)
        await running(lambda: len(sleep.slept) >= attempts + 10)
        assert not link.registered
        await controller.start()
        await running(lambda: "w" in controller.workers and link.registered)
    assert max(sleep.slept) <= 0.5  # never longer than a heartbeat
    states = [record.getMessage().split()[0] for record in caplog.records]
    assert states == ["registered", "lost", "cannot", "registered"]


async def test_waits_for_a_controller_that_starts_later(
    session: aiohttp.ClientSession, sleep: FakeSleep, controller: FakeController
) -> None:
    await controller.stop()
    link = make_link(controller.url, session, sleep)
    async with Running(link) as running:
        await running(lambda: len(sleep.slept) >= 12)
        await controller.start()
        await running(lambda: link.registered)
        before = [delay for delay in sleep.slept if delay != 0.5]
    assert before[0] <= 0.2
    assert MAX_RETRY_S / 2 <= max(before) <= MAX_RETRY_S
    assert len(set(before)) > 5  # jitter


@pytest.mark.parametrize("status", [404, 429, 500, 502, 503])
async def test_faults_that_may_pass_are_retried(link: ControllerLink, controller: FakeController, status: int) -> None:
    controller.fail_with = status
    async with Running(link) as running:
        await running(lambda: len(controller.calls) >= 3)
        controller.fail_with = None
        await running(lambda: link.registered)


async def test_an_answer_that_is_no_controllers_is_retried(link: ControllerLink, controller: FakeController) -> None:
    controller.fail_with = 200
    async with Running(link) as running:
        await running(lambda: len(controller.calls) >= 3)
        assert not link.registered


async def test_a_wrong_token_is_final(
    controller: FakeController, session: aiohttp.ClientSession, sleep: FakeSleep
) -> None:
    link = make_link(controller.url, session, sleep, worker_token="wrong")
    with pytest.raises(PermissionDeniedError, match="The worker token is wrong"):
        await link.run()
    assert controller.calls == ["register"]


async def test_a_refusal_without_a_reason_names_the_status(link: ControllerLink, controller: FakeController) -> None:
    controller.fail_with = 403
    with pytest.raises(UpstreamError, match="403"):
        await link.run()


async def test_a_token_that_changed_while_running_is_final(
    link: ControllerLink, controller: FakeController, session: aiohttp.ClientSession
) -> None:
    async with Running(link) as running:
        await running(lambda: link.registered)
        controller._worker_token = "another"
        with pytest.raises(PermissionDeniedError):
            await running(lambda: False)


async def test_leave(link: ControllerLink, controller: FakeController) -> None:
    async with Running(link) as running:
        await running(lambda: link.registered)
    assert await link.heartbeat()
    await link.leave()
    assert controller.workers == {}
    assert not await link.heartbeat()


async def test_leaving_a_controller_that_is_gone_is_quiet(link: ControllerLink, controller: FakeController) -> None:
    await controller.stop()
    await link.leave()
    assert not await link.heartbeat()
