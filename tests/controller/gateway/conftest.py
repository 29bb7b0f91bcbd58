from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from controller.config import WorkerConfig
from tests.fakes.gateway_fleet import Fleet, Start


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    fleets: list[Fleet] = []

    async def start(**config: object) -> Fleet:
        fleet = Fleet(WorkerConfig(**config))  # type: ignore[arg-type]
        await fleet.client.start()
        fleets.append(fleet)
        return fleet

    yield start
    for fleet in fleets:
        await fleet.close()


@pytest.fixture
async def fleet(start: Start) -> Fleet:
    return await start()
