from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI
from uvicorn.server import ServerState

from controller import openai as openai_api
from controller.config import LimitsConfig
from controller.errors_http import install_error_handlers
from controller.http_guard import GuardedH11Protocol
from controller.limits import ConcurrencyLimits, LimitsMiddleware
from controller.metrics import Metrics
from tests.controller.openai.api import Api
from tests.fakes.fake_gateway import FakeBackend, FakeGateway


@pytest.fixture(scope="session")
def app_backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def backend(app_backend: FakeBackend) -> FakeBackend:
    """The backend of `app`, with a gateway and metrics of this test's own."""
    app_backend.gateway = FakeGateway()
    app_backend.metrics = Metrics()
    return app_backend


@pytest.fixture
def gateway(backend: FakeBackend) -> FakeGateway:
    return backend.gateway


@pytest.fixture(scope="session")
def app(app_backend: FakeBackend) -> FastAPI:
    """The routes under the parts of the real app that their behaviour depends on; slow to make, so made once."""
    app = FastAPI(redirect_slashes=False)
    limits = LimitsConfig()
    app.add_middleware(
        LimitsMiddleware,
        limits=ConcurrencyLimits(limits),
        metrics=app_backend.metrics,
        max_body_bytes=limits.max_body_bytes,
    )
    install_error_handlers(app)
    app.include_router(openai_api.create_router(app_backend))
    return app


@pytest.fixture
async def base_url(app: FastAPI, backend: FakeBackend) -> AsyncIterator[str]:
    """The app on a loopback socket, behind the HTTP protocol that it is run with.

    uvicorn.Server is left out: it looks ten times a second whether it should go on, and there are hundreds of tests.
    """
    config = uvicorn.Config(app, http=GuardedH11Protocol, lifespan="off", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: GuardedH11Protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in list(state.connections):
            connection.shutdown()
        await asyncio.wait_for(asyncio.gather(*state.tasks), timeout=20.0)


@pytest.fixture
async def api(base_url: str) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession(base_url) as session:
        yield Api(session)


@pytest.fixture
async def client(base_url: str) -> AsyncIterator[AsyncOpenAI]:
    """The official client."""
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        yield client
