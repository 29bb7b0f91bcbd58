"""The controller as a process: a bound socket, uvicorn on it, and a stop that tells the clients."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket

import uvicorn
from fastapi import FastAPI

from controller.app import create_app
from controller.config import ControllerConfig, ServerConfig
from controller.cors import CorsMiddleware, parse_origins
from controller.http_guard import GuardedH11Protocol
from controller.state import ControllerState
from registry.catalog import Catalog
from registry.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_GRACE_AFTER_STOP_S = 2  # for the error events of the streams that were stopped


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket, made before anything else starts, so that a port in use is found at once.

    Raises:
        InvalidRequestError: the address is in use, not allowed or none of this machine's.
    """
    if config.port > 65535:  # getaddrinfo would take it modulo 65536
        raise InvalidRequestError(f"--port must be at most 65535, not {config.port}", param="port")
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidRequestError(
            f"cannot listen on {config.host} port {config.port}: {reason}; choose another --host or --port"
        ) from None
    listener.setblocking(False)
    return listener


class ControllerServer(uvicorn.Server):
    """uvicorn that ends the open streams with an error event when the time to stop is up, instead of cutting them.

    What `--allowed-origins` asks for is put around `app`, so that Starlette's own answers to bugs are within it.

    Raises:
        InvalidRequestError: one of those is no origin.
    """

    def __init__(self, config: ControllerConfig, app: FastAPI) -> None:
        self._stop_after_s = config.server.shutdown_timeout_s
        self._state: ControllerState = app.state.controller
        origins = parse_origins(config.server.allowed_origins)
        super().__init__(
            uvicorn.Config(
                CorsMiddleware(app, origins) if origins else app,
                http=GuardedH11Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=config.server.log_level == "debug",
                server_header=False,
                timeout_graceful_shutdown=math.ceil(self._stop_after_s) + _GRACE_AFTER_STOP_S,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._state.workers.stop_expiry()
        timer = asyncio.get_running_loop().call_later(self._stop_after_s, self._state.gateway.stop_streams)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve(config: ControllerConfig, catalog: Catalog) -> None:
    """Run the controller until SIGTERM or SIGINT.

    Raises:
        InvalidRequestError: the address cannot be listened on, or the configuration is contradictory.
    """
    with bind(config.server) as listener:
        host, port = listener.getsockname()[:2]
        app = create_app(config, catalog=catalog)
        server = ControllerServer(config, app)
        gc.collect()
        gc.freeze()  # else a full collection walks through all modules, and every stream stops for 0.06 s
        # uvicorn stops cleanly on a signal and then raises it again for the handler that was there before it.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        server.run(sockets=[listener])
