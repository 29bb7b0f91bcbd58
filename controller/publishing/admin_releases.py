"""Releases over HTTP, for operators and publishers.

POST   /admin/releases/{name}/versions                   make a version of files that are in the store
GET    /admin/releases                                   all of them
GET    /admin/releases/{name}
GET    /admin/releases/{name}/versions/{number}          with what each worker has of it
DELETE /admin/releases/{name}/versions/{number}
PUT    /admin/releases/{name}/aliases/{alias}            {"version"}
DELETE /admin/releases/{name}/aliases/{alias}
PUT    /admin/releases/{name}/aliases/{alias}/canary     {"version", "weight"}; DELETE: none
PUT    /admin/releases/{name}/aliases/{alias}/shadow     {"version"}; DELETE: none
POST   /admin/releases/{name}/aliases/{alias}/rollback
GET    /admin/releases/{name}/aliases/{alias}/history    who moved it when from where to where, newest first
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import AliasPath, BaseModel, Field

from controller.admin_variants import VariantOnWorker, on_worker_info
from controller.auth import actor_of
from controller.openai.body import RequestModel, openapi_body, read_request
from controller.openai.schemas import ModelName
from controller.publishing.operations import ReleaseOperations
from registry import names
from registry.catalog import Alias, AuditEntry, Canary, Release, VersionRecord, VersionState
from registry.published_files import MAX_FILES, VariantKind

Number = Annotated[int, Field(ge=1, lt=10**9)]


class AddVersion(RequestModel):
    files: dict[str, str] = Field(max_length=MAX_FILES, description="Their digests by name; all are in the store.")
    parent: ModelName | None = Field(default=None, description="The base model; else it is found by its digest.")
    base_digest: str | None = Field(default=None, max_length=71, description="Of the base that it was made for.")
    quality: dict[str, Any] | None = Field(default=None, description="What its maker measured; kept as it is.")


class SetVersion(RequestModel):
    version: Number


class SetCanary(RequestModel):
    version: Number
    weight: float = Field(ge=0.0, le=1.0, description="Share of the alias's requests.")


class VersionInfo(BaseModel):
    """Of a VersionRecord."""

    name: str
    release: str
    number: int
    kind: VariantKind
    parent: str
    digest: str
    files: Mapping[str, str]
    quality: Mapping[str, Any] | None
    state: VersionState
    error: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime


class VersionOnWorkers(BaseModel):
    version: VersionInfo
    workers: list[VariantOnWorker]


class AliasInfo(BaseModel):
    """Of an Alias."""

    alias: str
    version: int | None = Field(validation_alias=AliasPath("target", "version"))
    canary: Canary | None
    shadow: int | None
    updated_at: datetime


class ReleaseInfo(BaseModel):
    """Of a Release."""

    name: str
    created_at: datetime
    versions: list[VersionInfo]
    aliases: list[AliasInfo]


class ReleaseList(BaseModel):
    releases: list[ReleaseInfo]


class Move(BaseModel):
    """Of an AuditEntry."""

    at: datetime
    actor: str
    action: str
    detail: Mapping[str, Any]  # from, to, and the reason of what the controller did by itself


class History(BaseModel):
    moves: list[Move]


def create_release_router(releases: ReleaseOperations) -> APIRouter:
    router = APIRouter(prefix="/admin/releases", tags=["admin"])
    # Names hold slashes, so what follows them is matched from the end.
    version_path, alias_path = "/{name:path}/versions/{number}", "/{name:path}/aliases/{alias}"

    @router.post("/{name:path}/versions", response_model=VersionInfo, openapi_extra=openapi_body(AddVersion))
    async def add_version(name: str, request: Request) -> VersionRecord:
        body = await read_request(request, AddVersion)
        return await releases.add_version(
            name,
            parent=body.parent,
            base_digest=body.base_digest,
            files=body.files,
            quality=body.quality,
            actor=actor_of(request.scope),
        )

    @router.get("", response_model=ReleaseList)
    async def list_releases() -> dict[str, list[Release]]:
        return {"releases": await releases.list_releases()}

    @router.get(version_path, response_model=VersionOnWorkers)
    async def get_version(name: str, number: int) -> dict[str, Any]:
        version, on_workers = await releases.get_version(names.ModelName(name, version=number))
        return {"version": version, "workers": [on_worker_info(on) for on in on_workers]}

    @router.delete(version_path, response_model=VersionInfo)
    async def remove_version(name: str, number: int, request: Request) -> VersionRecord:
        subject = names.ModelName(name, version=number)
        return await releases.remove_version(subject, actor=actor_of(request.scope))

    @router.get(alias_path + "/history", response_model=History)
    async def alias_history(name: str, alias: str) -> dict[str, list[AuditEntry]]:
        return {"moves": await releases.alias_history(name, alias)}

    @router.post(alias_path + "/rollback", response_model=AliasInfo)
    async def rollback_alias(name: str, alias: str, request: Request) -> Alias:
        return await releases.rollback_alias(name, alias, actor=actor_of(request.scope))

    @router.put(alias_path + "/canary", response_model=AliasInfo, openapi_extra=openapi_body(SetCanary))
    async def set_canary(name: str, alias: str, request: Request) -> Alias:
        body = await read_request(request, SetCanary)
        canary = Canary(body.version, body.weight)
        return await releases.set_canary(name, alias, canary, actor=actor_of(request.scope))

    @router.delete(alias_path + "/canary", response_model=AliasInfo)
    async def remove_canary(name: str, alias: str, request: Request) -> Alias:
        return await releases.set_canary(name, alias, None, actor=actor_of(request.scope))

    @router.put(alias_path + "/shadow", response_model=AliasInfo, openapi_extra=openapi_body(SetVersion))
    async def set_shadow(name: str, alias: str, request: Request) -> Alias:
        body = await read_request(request, SetVersion)
        return await releases.set_shadow(name, alias, body.version, actor=actor_of(request.scope))

    @router.delete(alias_path + "/shadow", response_model=AliasInfo)
    async def remove_shadow(name: str, alias: str, request: Request) -> Alias:
        return await releases.set_shadow(name, alias, None, actor=actor_of(request.scope))

    @router.put(alias_path, response_model=AliasInfo, openapi_extra=openapi_body(SetVersion))
    async def set_alias(name: str, alias: str, request: Request) -> Alias:
        body = await read_request(request, SetVersion)
        return await releases.set_alias(name, alias, body.version, actor=actor_of(request.scope))

    @router.delete(alias_path, status_code=204)
    async def remove_alias(name: str, alias: str, request: Request) -> Response:
        await releases.remove_alias(name, alias, actor=actor_of(request.scope))
        return Response(status_code=204)

    @router.get("/{name:path}", response_model=ReleaseInfo)
    async def get_release(name: str) -> Release:
        return await releases.get_release(name)

    return router
