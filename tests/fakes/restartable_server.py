"""A server that can be away for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.fakes.ports import free_port


class RestartableServer(ABC):
    """An asynchronous context manager; listens on loopback, at the same address after a restart.

    Attributes:
        url: where it is, or was.
    """

    def __init__(self) -> None:
        self._port = free_port()
        self._server: TestServer | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    @abstractmethod
    def make_app(self) -> web.Application:
        """What answers; called at each start."""

    async def start(self) -> None:
        self._server = TestServer(self.make_app(), port=self._port)
        await self._server.start_server()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.stop()
