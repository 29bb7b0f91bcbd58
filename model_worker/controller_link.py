"""The worker's membership: registers with the controller, heartbeats, leaves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import aiohttp
from pydantic import BaseModel, ValidationError

from controller.protocol import (
    PROTOCOL_VERSION,
    WORKER_TOKEN_HEADER,
    ErrorEvent,
    HeartbeatReply,
    HeartbeatRequest,
    RegisterReply,
    RegisterRequest,
    ServedModel,
    VariantStatus,
    WorkerStats,
)
from model_worker.variant_reports import VariantReports
from registry.errors import RootgraftError, UpstreamError, error_from_code

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
FIRST_RETRY_S = 0.2
MAX_RETRY_S = 5.0
REFUSALS = frozenset({400, 401, 403, 409, 422})
"""Answers to a registration that no retry will change: wrong token, untrusted address, another protocol version."""
_NO_CONTROLLER = "its answer is none of a rootgraft controller"


class ControllerLink:
    """Keeps one worker registered for as long as `run` runs.

    A controller that is away, restarts or forgets the worker is tried again for ever, at most MAX_RETRY_S or one
    heartbeat apart. Logs once for each change of state.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        controller_url: str,
        *,
        worker_id: str,
        worker_url: str,
        worker_token: str | None,
        models: Sequence[ServedModel],
        stats: Callable[[], WorkerStats],
        variants: Callable[[], Awaitable[list[VariantStatus]]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: random.Random | None = None,
    ) -> None:
        self._session = session
        self._base = f"{controller_url.rstrip('/')}/internal/workers"
        self._worker_id = worker_id
        self._worker_url = worker_url
        self._headers = {"content-type": "application/json"}
        if worker_token is not None:
            self._headers[WORKER_TOKEN_HEADER] = worker_token
        self._models = list(models)
        self._stats = stats
        self._variants = variants
        self._reports = VariantReports()
        self._sleep = sleep
        self._jitter = jitter or random.Random()
        self._max_retry_s = MAX_RETRY_S
        self.registered = False

    async def run(self) -> None:
        """Stay registered until cancelled.

        Raises:
            RootgraftError: the controller refuses this worker for good.
        """
        while True:
            interval_s = await self._register()
            await self._heartbeat_until_lost(interval_s)

    async def heartbeat(self) -> bool:
        """Report stats and variants now; False: the controller does not know this worker (any more) or is not there."""
        try:
            report = self._reports.next(await self._variants())
            message = HeartbeatRequest(stats=self._stats(), variants=report)
            body = await self._post(f"/{self._worker_id}/heartbeat", message)
            self._reports.answered(HeartbeatReply.model_validate_json(body).report_number)
        except ValidationError:
            self._lost(_NO_CONTROLLER)
            return False
        except _Unreachable as error:
            self._lost(str(error))
            return False
        except _Refused as error:
            self._lost("it does not know this worker" if error.status == 404 else str(error))
            return False
        return True

    async def leave(self) -> None:
        """Say goodbye; a controller that cannot be told notices by the missing heartbeats."""
        with suppress(_Unreachable, _Refused):
            await self._post(f"/{self._worker_id}/leave", None)
        self.registered = False

    async def _register(self) -> float:
        """Register, however long it takes; returns the heartbeat interval in seconds."""
        self._reports.forget()
        request = RegisterRequest(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self._worker_id,
            url=self._worker_url,
            models=self._models,
            stats=self._stats(),
            variants=self._reports.next(await self._variants()),
        )
        delay_s = FIRST_RETRY_S
        warned = False
        while True:
            try:
                body = await self._post("/register", request)
                interval_s = RegisterReply.model_validate_json(body).heartbeat_interval_s
            except ValidationError:
                reason = _NO_CONTROLLER
            except _Unreachable as error:
                reason = str(error)
            except _Refused as error:
                if error.status in REFUSALS:
                    raise error.reported() from error
                reason = str(error)
            else:
                self._reports.answered(request.variants.number)
                self._max_retry_s = min(MAX_RETRY_S, interval_s)
                self.registered = True
                logger.info("registered with the controller at %s", self._base)
                return interval_s
            if not warned:
                warned = True
                logger.warning("cannot register at %s: %s; trying on", self._base, reason)
            await self._sleep(delay_s * self._jitter.uniform(0.5, 1.0))
            delay_s = min(delay_s * 2, self._max_retry_s)
            report = self._reports.next(await self._variants())
            request = request.model_copy(update={"stats": self._stats(), "variants": report})

    async def _heartbeat_until_lost(self, interval_s: float) -> None:
        while True:
            await self._sleep(interval_s)
            if not await self.heartbeat():
                return

    def _lost(self, reason: str) -> None:
        if self.registered:
            self.registered = False
            logger.warning("lost the controller at %s: %s", self._base, reason)

    async def _post(self, path: str, message: BaseModel | None) -> bytes:
        data = None if message is None else message.model_dump_json(exclude_defaults=True)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            async with self._session.post(
                self._base + path, data=data, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                body = await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Unreachable(str(error) or type(error).__name__) from error
        if status >= 300:
            raise _Refused(status, body)
        return body


class _Unreachable(Exception):
    """The controller did not answer."""


class _Refused(Exception):
    """The controller answered with an error."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self._event: ErrorEvent | None = None
        with suppress(ValidationError):
            self._event = ErrorEvent.model_validate_json(body)
        super().__init__(f"status {status}" + (f", {self._event.message}" if self._event else ""))

    def reported(self) -> RootgraftError:
        """The controller's own error, for the worker's last line."""
        if self._event is None:
            return UpstreamError(f"The controller refused this worker with status {self.status}.")
        return error_from_code(self._event.code, f"The controller refused this worker: {self._event.message}")
