"""A running controller: the real app and server on a loopback socket, in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fastapi import FastAPI

from controller.app import create_app
from controller.config import (
    AuthConfig,
    ControllerConfig,
    LimitsConfig,
    PublishingConfig,
    ServerConfig,
    WorkerConfig,
)
from controller.server import ControllerServer, bind
from controller.state import ControllerState
from registry.catalog import Catalog


@dataclass(frozen=True, slots=True)
class RunningController:
    url: str
    port: int
    app: FastAPI
    server: ControllerServer
    client: aiohttp.ClientSession

    @property
    def state(self) -> ControllerState:
        state: ControllerState = self.app.state.controller
        return state

    async def get(self, path: str, **options: Any) -> aiohttp.ClientResponse:
        return await self._request("GET", path, options)

    async def head(self, path: str, **options: Any) -> aiohttp.ClientResponse:
        return await self._request("HEAD", path, options)

    async def post(self, path: str, **options: Any) -> aiohttp.ClientResponse:
        return await self._request("POST", path, options)

    async def _request(self, method: str, path: str, options: dict[str, Any]) -> aiohttp.ClientResponse:
        async with self.client.request(method, self.url + path, **options) as response:
            await response.read()
            return response


StartController = Callable[..., Awaitable[RunningController]]


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path / 'catalog.sqlite3'}") as catalog:
        yield catalog


@pytest.fixture
async def start_controller(catalog: Catalog) -> AsyncIterator[StartController]:
    """Start a controller; keyword arguments are fields of any of the config classes, `app` edits the app first."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*, edit: Callable[[FastAPI], None] | None = None, **values: Any) -> RunningController:
            # Tests listen on loopback whatever `host` says to the rest of the configuration.
            config = controller_config(**{"port": 0, "shutdown_timeout_s": 0.1, **values})
            app = create_app(config, catalog=catalog, clock=asyncio.get_running_loop().time)
            if edit is not None:
                edit(app)
            listener = stack.enter_context(bind(dataclasses.replace(config.server, host="127.0.0.1")))
            port = listener.getsockname()[1]
            server = ControllerServer(config, app)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            client = await stack.enter_async_context(aiohttp.ClientSession())
            stack.push_async_callback(_stop, server, serving)
            return RunningController(f"http://127.0.0.1:{port}", port, app, server, client)

        yield start


async def _stop(server: ControllerServer, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving


def controller_config(**values: Any) -> ControllerConfig:
    """A ControllerConfig from the fields of all its parts."""
    parts: dict[str, Any] = {}
    for name, kind in (
        ("server", ServerConfig),
        ("auth", AuthConfig),
        ("workers", WorkerConfig),
        ("limits", LimitsConfig),
        ("publishing", PublishingConfig),
    ):
        own = {field.name: values.pop(field.name) for field in dataclasses.fields(kind) if field.name in values}
        parts[name] = kind(**own)
    assert not values, f"no such fields: {sorted(values)}"
    return ControllerConfig(**parts)
