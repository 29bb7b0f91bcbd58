"""The membership half of a controller, over HTTP, with faults that a test chooses."""

from __future__ import annotations

from aiohttp import web

from controller.protocol import (
    PROTOCOL_VERSION,
    WORKER_TOKEN_HEADER,
    ErrorEvent,
    HeartbeatReply,
    HeartbeatRequest,
    RegisterReply,
    RegisterRequest,
    VariantReport,
    VariantStatus,
    WorkerStats,
)
from controller.reported_variants import ReportedVariants
from tests.fakes.restartable_server import RestartableServer


class FakeController(RestartableServer):
    """Remembers who registered. An asynchronous context manager; listens on a port that the OS chooses.

    Attributes:
        workers: last registration of each worker that is registered.
        calls: all calls in order: "register", "heartbeat", "leave".
        stats: those of each heartbeat, in order.
        reports: of variants, those of registrations and heartbeats, in order.
        variants: by name, of the worker that spoke last.
        fail_with: answer everything with this status.
    """

    def __init__(self, *, worker_token: str | None = None, heartbeat_interval_s: float = 1.0) -> None:
        super().__init__()
        self.workers: dict[str, RegisterRequest] = {}
        self.calls: list[str] = []
        self.stats: list[WorkerStats] = []
        self.reports: list[VariantReport] = []
        self.variants: dict[str, VariantStatus] = {}
        self._reported: dict[str, ReportedVariants] = {}  # by worker
        self.fail_with: int | None = None
        self._worker_token = worker_token
        self._heartbeat_interval_s = heartbeat_interval_s

    def make_app(self) -> web.Application:
        """With an empty memory."""
        self.workers.clear()
        app = web.Application()
        app.router.add_post("/internal/workers/register", self._register)
        app.router.add_post("/internal/workers/{id}/heartbeat", self._heartbeat)
        app.router.add_post("/internal/workers/{id}/leave", self._leave)
        return app

    async def _register(self, request: web.Request) -> web.Response:
        self.calls.append("register")
        if refusal := self._refusal(request):
            return refusal
        message = RegisterRequest.model_validate_json(await request.read())
        if message.protocol_version != PROTOCOL_VERSION:
            return _error(400, "invalid_request", "Another protocol version.")
        self.workers[message.worker_id] = message
        self.reports.append(message.variants)
        self._reported[message.worker_id] = ReportedVariants()
        self._reported[message.worker_id].take(message.variants)
        return web.json_response(RegisterReply(heartbeat_interval_s=self._heartbeat_interval_s).model_dump())

    async def _heartbeat(self, request: web.Request) -> web.Response:
        self.calls.append("heartbeat")
        if refusal := self._refusal(request):
            return refusal
        if request.match_info["id"] not in self.workers:
            return _error(404, "invalid_request", "Register again.")
        message = HeartbeatRequest.model_validate_json(await request.read())
        self.stats.append(message.stats)
        self.reports.append(message.variants)
        reported = self._reported[request.match_info["id"]]
        reported.take(message.variants)
        self.variants = reported.by_name
        return web.json_response(HeartbeatReply(report_number=reported.number).model_dump())

    async def _leave(self, request: web.Request) -> web.Response:
        self.calls.append("leave")
        if refusal := self._refusal(request):
            return refusal
        self.workers.pop(request.match_info["id"], None)
        return web.Response(status=204)

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.fail_with is not None:
            return web.Response(status=self.fail_with, text="<html>fault</html>")
        if self._worker_token is not None and request.headers.get(WORKER_TOKEN_HEADER) != self._worker_token:
            return _error(403, "permission_denied", "The worker token is wrong.")
        return None


def _error(status: int, code: str, message: str) -> web.Response:
    body = ErrorEvent(code=code, message=message).model_dump_json()
    return web.Response(status=status, text=body, content_type="application/json")
