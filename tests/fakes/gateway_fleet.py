"""A gateway with fake workers on real loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from controller.config import WorkerConfig
from controller.gateway import Gateway
from controller.protocol import (
    DeltaEvent,
    GenerateRequest,
    Sampling,
    TextPrompt,
)
from controller.routing import RoundRobin
from controller.served_names import ServedName, ServedNames
from controller.trusted_networks import TrustedNetworks
from controller.variants.directory import VariantDirectory
from controller.variants.failures import Failures
from controller.worker_client import GenerateEvents, WorkerClient
from controller.workers import Worker, WorkerTable
from tests.fakes.fake_worker import FakeWorker, Script

LIMIT_S = 20.0  # nothing here waits for it unless it is broken

Start = Callable[..., Awaitable["Fleet"]]


class Fleet:
    """A gateway and its workers; names resolve to `m` where they are in `aliases`."""

    def __init__(self, config: WorkerConfig) -> None:
        self.table = WorkerTable(clock=lambda: 0.0, expiry_s=1.0)
        self.client = WorkerClient(config, TrustedNetworks.parse(config.trusted_workers))
        self.aliases = {"m@prod": ServedName("m"), "away": ServedName("away"), "sql@prod": ServedName("sql", "m")}
        self.directory = VariantDirectory(self.table, Failures(lambda: 0.0))
        self.gateway = Gateway(
            self.table,
            self.client,
            RoundRobin(random.Random(0)),  # tries the workers in the order in which they were added
            ServedNames(self.table, self.directory, self._resolve, wall_clock=lambda: 1700000000.9),
            self.directory,
            self._bring,
            max_attempts=config.max_attempts,
            retry_after_s=2.0,
        )
        self.brought: list[tuple[str, list[str]]] = []  # worker, variants
        self.on_bring: Callable[[Worker, Sequence[str]], Awaitable[None]] | None = None
        self._stack = contextlib.AsyncExitStack()

    async def _resolve(self, name: str) -> ServedName | None:
        return self.aliases.get(name)

    async def _bring(self, worker: Worker, names: Sequence[str]) -> None:
        self.brought.append((worker.worker_id, list(names)))
        if self.on_bring is not None:
            await self.on_bring(worker, names)

    async def add(self, *scripts: Script, **options: object) -> FakeWorker:
        worker = FakeWorker(f"w{len(self.table) + 1}", scripts[-1] if scripts else Script(), **options)  # type: ignore[arg-type]
        worker.scripts = list(scripts[:-1])
        await self._stack.enter_async_context(worker)
        self.table.register(worker.registration())
        return worker

    async def events(self, model: str = "m", **options: object) -> list[object]:
        async with asyncio.timeout(LIMIT_S):
            stream = self.gateway.stream(request(model), **options)  # type: ignore[arg-type]
            return [event async for events in stream for event in events]

    async def close(self) -> None:
        await self._stack.aclose()
        await self.client.stop()
        assert self.gateway._open_streams == set()
        assert [worker.num_in_flight for worker in self.table] == [0] * len(self.table)


def request(model: str = "m", **sampling: int) -> GenerateRequest:
    return GenerateRequest(request_id="r1", model=model, prompt=TextPrompt(text="hi"), sampling=Sampling(**sampling))


def kinds(events: list) -> list[str]:
    return [event.kind for event in events]


async def first_events(stream: AsyncIterator[list[GenerateEvents]], number: int) -> list[GenerateEvents]:
    """The first events of a stream whose worker sends so many and then waits."""
    events: list[GenerateEvents] = []
    while len(events) < number:
        events += await anext(stream)
    return events


def text(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, DeltaEvent))
