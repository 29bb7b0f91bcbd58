"""What workers call: register, heartbeat, leave. The messages and the errors are those of `controller.protocol`."""

from __future__ import annotations

import json
import logging
import re
from typing import TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from controller.catalog_access import record_models
from controller.errors_http import validation_error
from controller.protocol import HeartbeatReply, HeartbeatRequest, RegisterReply, RegisterRequest
from controller.state import ControllerState
from controller.trusted_networks import TrustedNetworks
from controller.worker_peer import check_worker
from controller.workers import check_protocol_version
from registry.errors import (
    ClientError,
    InvalidRequestError,
)

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
_WORKER_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class UnknownWorkerError(ClientError):
    """The answer to a heartbeat from before a restart of the controller: register again."""

    status = 404
    code = "worker_unknown"


def create_router(state: ControllerState, trusted: TrustedNetworks) -> APIRouter:
    """The routes below /internal/workers.

    Without a worker token only processes on this machine may call them. With one, whoever knows the token may; in both
    cases the URL that a worker announces must lie within `trusted`.
    """
    token = state.config.workers.worker_token

    def check_peer(request: Request) -> None:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # A web page may post other types to this machine without asking first.
            raise InvalidRequestError("send the header Content-Type: application/json")
        check_worker(request, token)

    router = APIRouter(prefix="/internal/workers", dependencies=[Depends(check_peer)], include_in_schema=False)

    @router.post("/register")
    async def register(request: Request) -> Response:
        message = _parse_registration(await request.body())
        await trusted.check_url(message.url)
        state.workers.check(message)
        created_at = await record_models(state.catalog, message.models, worker_id=message.worker_id)
        worker, replaced = state.workers.register(message)
        for model in worker.models:
            state.gateway.note_created(model.name, created_at.get(model.name))
        for old in replaced:
            if old.worker_id != worker.worker_id:
                state.gateway.worker_gone(old, f"was replaced by {worker.worker_id}")
        models = ", ".join(model.name for model in worker.models)
        state.reconciler.nudge(worker)
        logger.info("worker %s at %s registered with %s", worker.worker_id, worker.url, models)
        return _json(RegisterReply(heartbeat_interval_s=state.config.workers.heartbeat_interval_s))

    @router.post("/{worker_id}/heartbeat")
    async def heartbeat(worker_id: str, request: Request) -> Response:
        message = _parse(HeartbeatRequest, await request.body())
        worker = state.workers.heartbeat(worker_id, message.stats, message.variants)
        if worker is None:
            raise UnknownWorkerError(f"this controller does not know the worker {worker_id!r}; register again")
        state.reconciler.nudge(worker)
        return _json(HeartbeatReply(report_number=worker.reported.number))

    @router.post("/{worker_id}/leave")
    async def leave(worker_id: str) -> Response:
        worker = state.workers.leave(worker_id)
        if worker is not None:
            logger.info("worker %s left", worker_id)
        return Response(status_code=204)

    return router


def _parse_registration(body: bytes) -> RegisterRequest:
    """Check the protocol version before the rest: another version has other fields."""
    try:
        version = json.loads(body)["protocol_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if isinstance(version, int):
        check_protocol_version(version)
    message = _parse(RegisterRequest, body)
    if not _WORKER_ID.fullmatch(message.worker_id):
        raise InvalidRequestError(
            "a worker id has 1 to 128 letters, digits and the characters . _ : -", param="worker_id"
        )
    if not message.models:
        raise InvalidRequestError("a worker must serve at least one model", param="models")
    return message


def _parse(kind: type[M], body: bytes) -> M:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_context=False)) from None


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")
