"""What operators do with variants: list, add, remove, pin, unpin, activate, evict, on all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from controller.auth import actor_of
from controller.openai.body import RequestModel, openapi_body, read_request
from controller.openai.schemas import ModelName
from controller.protocol import VariantKind, VariantStatus
from controller.state import ControllerState
from controller.variants.directory import OnWorker, unknown_variant


class AddVariant(RequestModel):
    name: ModelName
    parent: ModelName | None = Field(default=None, description="The base model; needed where several are served.")
    path: str = Field(min_length=1, max_length=4096, description="Below the workers' adapter root.")
    pinned: bool = False
    replace: bool = Field(default=False, description="A variant of that name may be there; it is replaced.")


class WantedVariant(BaseModel):
    """What the catalog says."""

    path: str
    digest: str | None
    pinned: bool
    created_at: datetime
    updated_at: datetime


class VariantError(BaseModel):
    code: str
    message: str


class VariantOnWorker(BaseModel):
    worker_id: str
    status: VariantStatus | None  # null: the worker has none of that name
    usable: bool  # requests for it can be sent there
    error: VariantError | None
    retry_in_s: float | None  # until what failed is tried again


class VariantInfo(BaseModel):
    name: str
    kind: VariantKind | None  # null: no worker has read it yet
    parent: str | None
    wanted: WantedVariant | None  # null: workers have it from their command lines
    workers: list[VariantOnWorker]


class VariantList(BaseModel):
    variants: list[VariantInfo]


def create_router(state: ControllerState) -> APIRouter:
    router = APIRouter(prefix="/admin/variants", tags=["admin"])

    def info(name: str, on_workers: Sequence[OnWorker]) -> VariantInfo:
        record = state.directory.wanted.get(name)
        return VariantInfo(
            name=name,
            kind=state.directory.kind_of(name),
            parent=state.directory.parent_of(name),
            wanted=None if record is None else WantedVariant.model_validate(record, from_attributes=True),
            workers=[on_worker_info(on) for on in on_workers],
        )

    @router.get("")
    async def list_variants() -> VariantList:
        await state.reconciler.refresh()
        names = sorted(state.directory.names())
        return VariantList(variants=[info(name, state.directory.on_workers(name)) for name in names])

    @router.post("", openapi_extra=openapi_body(AddVariant))
    async def add_variant(request: Request) -> VariantInfo:
        body = await read_request(request, AddVariant)
        on_workers = await state.variants.add(
            body.name,
            parent=body.parent,
            path=body.path,
            pinned=body.pinned,
            replace=body.replace,
            actor=actor_of(request.scope),
        )
        return info(body.name, on_workers)

    # Names hold slashes; the verb is what follows the last one.
    @router.post("/{name:path}/pin")
    async def pin_variant(name: str, request: Request) -> VariantInfo:
        return info(name, await state.variants.pin(name, True, actor=actor_of(request.scope)))

    @router.post("/{name:path}/unpin")
    async def unpin_variant(name: str, request: Request) -> VariantInfo:
        return info(name, await state.variants.pin(name, False, actor=actor_of(request.scope)))

    @router.post("/{name:path}/activate")
    async def activate_variant(name: str) -> VariantInfo:
        """Make it ready to be used at once; it may be evicted again, unless it is pinned."""
        return info(name, await state.variants.move(name, "activate"))

    @router.post("/{name:path}/evict")
    async def evict_variant(name: str) -> VariantInfo:
        """Free its memory; the next request for it brings it back."""
        return info(name, await state.variants.move(name, "evict"))

    @router.get("/{name:path}")
    async def get_variant(name: str) -> VariantInfo:
        await state.reconciler.refresh()
        if state.directory.parent_of(name) is None:
            raise unknown_variant(name)
        return info(name, state.directory.on_workers(name))

    @router.delete("/{name:path}")
    async def remove_variant(name: str, request: Request) -> VariantInfo:
        return info(name, await state.variants.remove(name, actor=actor_of(request.scope)))

    return router


def on_worker_info(on: OnWorker) -> VariantOnWorker:
    return VariantOnWorker(
        worker_id=on.worker.worker_id,
        status=on.status,
        usable=on.usable,
        error=None if on.error is None else VariantError(code=on.error.code, message=on.error.message),
        retry_in_s=on.retry_in_s,
    )
