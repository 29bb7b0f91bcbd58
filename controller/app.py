"""The controller's ASGI application: what is built, in which order a request passes it, and what runs beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response

from controller import admin, admin_variants, internal, lora_adapters, openai
from controller.auth import Authenticator, AuthMiddleware, keys_required
from controller.catalog_access import find_principal, name_resolver
from controller.config import ControllerConfig
from controller.errors_http import install_error_handlers
from controller.gateway import Gateway
from controller.http_guard import HttpGuardMiddleware
from controller.key_rules import KeyRules
from controller.limits import ConcurrencyLimits, LimitsMiddleware
from controller.metrics import Metrics
from controller.publishing.admin_releases import create_release_router
from controller.publishing.blobs import create_blob_router
from controller.publishing.canaries import CanaryJudge
from controller.publishing.gateway import ReleaseGateway
from controller.publishing.operations import ReleaseOperations
from controller.publishing.release_counts import ReleaseCounts
from controller.publishing.release_directory import ReleaseDirectory
from controller.routing import create_policy
from controller.scrape import WorkerCollector, fetch_stats
from controller.scrape_variants import VariantCollector
from controller.served_names import ServedNames
from controller.state import ControllerState
from controller.trusted_networks import TrustedNetworks, is_loopback
from controller.variants.directory import VariantDirectory
from controller.variants.failures import Failures
from controller.variants.operations import VariantOperations
from controller.variants.reconciler import VariantReconciler
from controller.worker_client import WorkerClient
from controller.workers import WorkerTable
from registry.catalog import Catalog
from registry.store import Store

logger = logging.getLogger(__name__)


def create_app(
    config: ControllerConfig,
    *,
    catalog: Catalog,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """Build the controller; `app.state.controller` is its ControllerState.

    A request passes, from the outside in: where pages of other origins are allowed CorsMiddleware, which the server
    puts around all this; HttpGuardMiddleware (framing), AuthMiddleware (key), LimitsMiddleware (body size,
    concurrency), then its route.

    Args:
        catalog: stays open and belongs to the caller.
        clock: monotonic seconds, for heartbeats and measurements.

    Raises:
        InvalidRequestError: `config` has a malformed network.
    """
    trusted = TrustedNetworks.parse(config.workers.trusted_workers)
    client = WorkerClient(config.workers, trusted)
    store = None if config.publishing.store is None else Store(Path(config.publishing.store))
    state = _create_state(config, catalog, store, client, clock)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await client.start()
        tasks = [
            asyncio.create_task(_expire_workers(state), name="expire-workers"),
            asyncio.create_task(state.releases.watch(), name="watch-releases"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            state.gateway.stop_streams()
            await state.releases.stop()
            await state.release_gateway.shadows.stop()
            await state.reconciler.stop()
            await client.stop()

    app = FastAPI(
        title="rootgraft",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from a content network
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(HttpGuardMiddleware),
            Middleware(AuthMiddleware, authenticator=state.auth, metrics=state.metrics),
            Middleware(
                LimitsMiddleware,
                limits=state.limits,
                metrics=state.metrics,
                max_body_bytes=config.limits.max_body_bytes,
            ),
        ],
    )
    app.state.controller = state
    install_error_handlers(app)
    app.include_router(openai.create_router(PublicApi(state.release_gateway, state.metrics, state.key_rules)))
    app.include_router(admin.create_router(state))
    app.include_router(admin_variants.create_router(state))
    app.include_router(lora_adapters.create_router(state))
    app.include_router(internal.create_router(state, trusted))
    app.include_router(create_blob_router(store, config.publishing, config.workers.worker_token, catalog))
    app.include_router(create_release_router(state.releases))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operations"])
    async def health() -> JSONResponse:
        """Liveness: 200 as long as the controller answers, with or without workers."""
        return JSONResponse({"status": "ok", "workers": state.workers.num_ready})

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", tags=["operations"])
    async def metrics() -> Response:
        """Prometheus' text format; the workers are asked for their counts now."""
        workers = WorkerCollector(await fetch_stats(state.workers, client))
        variants = VariantCollector(tuple(state.workers), wall_clock=time.time)
        collected = state.metrics.render(workers, variants, state.release_counts)
        return Response(collected, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _create_state(
    config: ControllerConfig,
    catalog: Catalog,
    store: Store | None,
    client: WorkerClient,
    clock: Callable[[], float],
) -> ControllerState:
    interval_s = config.workers.heartbeat_interval_s
    workers = WorkerTable(clock=clock, expiry_s=interval_s * config.workers.missed_heartbeats)
    failures = Failures(clock)
    directory = VariantDirectory(workers, failures)
    reconciler = VariantReconciler(catalog, workers, directory, failures, client, clock=clock)
    variants = VariantOperations(catalog, workers, directory, failures, reconciler, client)
    releases = ReleaseDirectory()
    canaries = CanaryJudge(
        margin=config.publishing.canary_error_margin, min_requests=config.publishing.canary_min_requests
    )
    counts = ReleaseCounts(releases)
    gateway = Gateway(
        workers,
        client,
        create_policy(config.workers.routing, random.Random()),
        ServedNames(workers, directory, name_resolver(catalog, clock=clock)),
        directory,
        reconciler.bring,
        max_attempts=config.workers.max_attempts,
        retry_after_s=2 * interval_s,
    )
    return ControllerState(
        config=config,
        catalog=catalog,
        workers=workers,
        directory=directory,
        reconciler=reconciler,
        variants=variants,
        releases=ReleaseOperations(catalog, store, workers, releases, directory, variants, canaries),
        release_counts=counts,
        gateway=gateway,
        release_gateway=ReleaseGateway(gateway, releases, canaries, counts),
        metrics=Metrics(clock),
        auth=Authenticator(
            find_principal(catalog),
            required=keys_required(config.auth, config.server.host),
            metrics_open=is_loopback(config.server.host),
            clock=clock,
        ),
        key_rules=KeyRules(config.limits, clock),
        limits=ConcurrencyLimits(config.limits, clock),
    )


@dataclass(frozen=True, slots=True)
class PublicApi:
    """A `controller.openai.backend.Backend`."""

    gateway: ReleaseGateway
    metrics: Metrics
    key_rules: KeyRules


async def _expire_workers(state: ControllerState) -> None:
    """Forget workers whose heartbeats stopped, and end their streams, within half an interval of the deadline."""
    config = state.config.workers
    pause_s = config.heartbeat_interval_s / 2
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        await asyncio.sleep(pause_s)
        late_s = loop.time() - began - pause_s
        if late_s > pause_s:  # the machine, or this process, stood still
            state.workers.excuse(late_s)
        for worker in state.workers.expire():
            logger.warning("worker %s is gone: %d heartbeats missing", worker.worker_id, config.missed_heartbeats)
            state.gateway.worker_gone(worker, f"is gone ({config.missed_heartbeats} heartbeats missing)")
