"""The HTTP server of the web UI."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

SHUTDOWN_TIMEOUT_S = 3


class Server(uvicorn.Server):
    """Serves the application of `create_app`; SIGINT and SIGTERM end it with status 0, also while pages are open."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            )
        )
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.end_streams()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn does, but without raising the signal again after the server has ended."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
