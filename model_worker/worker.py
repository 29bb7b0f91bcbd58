"""The life of a worker process once its model is loaded: serve, stay registered, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import uvicorn

from adapters.load_plan import LoadPlan
from model_worker.app import create_app
from model_worker.config import DEFAULT_PORT, WorkerConfig
from model_worker.controller_link import ControllerLink
from model_worker.published_variants import PublishedVariants
from model_worker.service import Engine, WorkerService
from model_worker.signature_check import SignatureCheck
from registry.errors import InternalError, InvalidRequestError, OverloadedError

logger = logging.getLogger(__name__)

PORTS_TRIED = 100
FLUSH_TIMEOUT_S = 5.0
"""How long requests that were told to end may take to send their last event."""
ENGINE_DEATH_TIMEOUT_S = 1.0
"""How long requests may take to report that the engine died under them."""


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket; a port of None is DEFAULT_PORT or the next free one.

    Raises:
        InvalidRequestError: the address cannot be had.
    """
    ports = range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port is None else (port,)
    for candidate in ports:
        try:
            address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(address[0], socket.SOCK_STREAM)
        except OSError as error:
            raise InvalidRequestError(f"Cannot listen on {host}: {error.strerror}; choose another --host.") from error
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address[4])
            sock.listen(1024)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE and port is None:
                continue
            raise InvalidRequestError(
                f"Cannot listen on {host}:{candidate}: {error.strerror}; choose another --port or --host."
            ) from error
        return sock
    raise InvalidRequestError(
        f"No free port from {DEFAULT_PORT} to {DEFAULT_PORT + PORTS_TRIED - 1} on {host}; choose one with --port."
    )


def reachable_url(config: WorkerConfig, sock: socket.socket) -> str:
    """The URL under which the controller reaches this worker."""
    if config.advertise_url is not None:
        return config.advertise_url
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = _own_address(config.controller) if config.controller else socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_address(controller: str) -> str:
    """This machine's address on the way to the controller; connecting a datagram socket sends nothing."""
    parts = urlsplit(controller)
    assert parts.hostname is not None
    try:
        family, _, _, _, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InvalidRequestError(
            f"Cannot find the way to {parts.hostname} ({error.strerror}); give --advertise-url."
        ) from error


class Worker:
    """One serving worker."""

    def __init__(
        self,
        engine: Engine,
        plan: LoadPlan,
        config: WorkerConfig,
        sock: socket.socket,
        *,
        model_name: str,
        digest: str | None = None,
        cache_dir: Path | None = None,
        check_signature: SignatureCheck | None = None,
        engine_died: asyncio.Event,
    ) -> None:
        """Args:
        cache_dir: where published versions are kept; None: this worker serves none.
        check_signature: as in Variants.
        engine_died: set by the engine, in the event loop's thread, when it can serve no more.
        """
        self.id = f"worker-{uuid.uuid4().hex[:12]}"
        self._engine = engine
        self._engine_died = engine_died
        self._config = config
        self._sock = sock
        self._url = reachable_url(config, sock)
        published = None
        if cache_dir is not None:
            published = PublishedVariants(cache_dir, config.controller, config.worker_token)
        self._service = WorkerService(
            engine,
            plan,
            model_name,
            digest=digest,
            adapter_root=config.adapter_root,
            published=published,
            adapter_templates=config.chat_template is None,
            check_signature=check_signature,
        )
        self._stop = asyncio.Event()

    async def run(self, report: Callable[[str], None] = logger.info) -> int:
        """Load the adapters, then serve until a signal or the death of the engine; returns the exit status.

        Args:
            report: called with a line for each adapter that is loaded.

        Raises:
            RootgraftError: an adapter is refused, or the controller refuses this worker for good.
        """
        await self._engine.start()
        try:
            await self._service.variants.load(self._config.variants, report)
            return await self._run()
        finally:
            await self._engine.stop()
            self._service.close()

    async def _run(self) -> int:
        app = create_app(self._service, worker_token=self._config.worker_token)
        server = _Server(
            uvicorn.Config(
                app,
                http="h11",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_graceful_shutdown=int(FLUSH_TIMEOUT_S),
            )
        )
        with self._signals():
            serving = asyncio.create_task(server.serve(sockets=[self._sock]))
            try:
                async with aiohttp.ClientSession() as session:
                    return await self._serve(session, serving)
            finally:
                server.should_exit = True
                await serving

    async def _serve(self, session: aiohttp.ClientSession, serving: asyncio.Task[None]) -> int:
        link = self._link(session)
        linking = asyncio.create_task(link.run()) if link else None
        stopped = asyncio.create_task(self._stop.wait())
        died = asyncio.create_task(self._engine_died.wait())
        cleaning = asyncio.create_task(self._service.variants.clean())
        own = [task for task in (linking, stopped, died) if task]
        logger.info("%s serves %s at %s", self.id, self._service.model.name, self._url)
        try:
            await asyncio.wait((serving, *own), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                raise InternalError("The HTTP server ended by itself; start the worker again.")
            if linking and linking.done():
                await self._drain(None, self._config.drain_timeout_s)
                linking.result()  # raises why it ended
            if died.done():
                logger.error("the engine died: %r", self._engine.failed)
                await self._drain(link, ENGINE_DEATH_TIMEOUT_S)
                return 1
            logger.info("draining: %d requests run", self._service.drain.num_running)
            await self._drain(link, self._config.drain_timeout_s)
            return 0
        finally:
            for task in (*own, cleaning):
                task.cancel()
            await asyncio.gather(*own, cleaning, return_exceptions=True)
            if link and link.registered:
                await link.leave()

    async def _drain(self, link: ControllerLink | None, timeout_s: float) -> None:
        """Take nothing new, let what runs finish for `timeout_s`, then end it."""
        drain = self._service.drain
        drain.begin()
        if link and link.registered:
            await link.heartbeat()  # the controller routes nothing here from now on
        if not await drain.wait_idle(timeout_s):
            drain.cancel(OverloadedError("This worker is shutting down; send the request again."))
            if not await drain.wait_idle(FLUSH_TIMEOUT_S):
                logger.warning("%d requests could not be told to end", drain.num_running)

    def _link(self, session: aiohttp.ClientSession) -> ControllerLink | None:
        if self._config.controller is None:
            return None
        return ControllerLink(
            session,
            self._config.controller,
            worker_id=self.id,
            worker_url=self._url,
            worker_token=self._config.worker_token,
            models=[self._service.model],
            stats=self._service.stats,
            variants=self._service.variants.report,
        )

    @contextlib.contextmanager
    def _signals(self) -> Generator[None, None, None]:
        """SIGTERM and SIGINT drain; the second of them ends the process at once."""
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if self._stop.is_set():
                os._exit(128 + number)
            self._stop.set()

        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


class _Server(uvicorn.Server):
    """Leaves the signals to the worker, which drains before it stops serving."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
