"""The files of published fine-tunes over HTTP: operators put them, workers get them.

    HEAD /admin/blobs/{digest}      200: it is there; 404: it is not, and Upload-Offset says how much of it has come
    PUT  /admin/blobs/{digest}      all of it, or with Upload-Offset and Upload-Length one part after the other
                                    → 201: it is there now; 200: it was; 202: Upload-Offset says how much has come
    GET  /internal/blobs/{digest}   for workers; Range is understood
    GET  /internal/versions         for workers: of which versions they need the files

A part that begins where the last one ended is added to it; one that begins at 0 starts again. What broke off stays, and
is seen by nobody, until it is continued.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import ExitStack
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from controller.config import PublishingConfig
from controller.openai.responses import client_gone
from controller.protocol import VersionsReply
from controller.worker_peer import check_worker
from registry.blob_receiver import BlobReceiver
from registry.catalog import Catalog
from registry.errors import InternalError, InvalidRequestError, ModelNotFoundError, RequestTooLargeError, RootgraftError
from registry.store import Store

OFFSET_HEADER, LENGTH_HEADER = "upload-offset", "upload-length"
_WRITE_BYTES = 4 << 20


class BlobResponse(FileResponse):
    chunk_size = 1 << 20


def create_blob_router(
    store: Store | None, config: PublishingConfig, worker_token: str | None, catalog: Catalog
) -> APIRouter:
    router = APIRouter()

    @router.head("/admin/blobs/{digest}", tags=["admin"])
    async def find_blob(digest: str) -> Response:
        opened = require_store(store)
        found = await asyncio.to_thread(opened.__contains__, digest)
        num_bytes = await asyncio.to_thread(opened.num_bytes_received, digest)
        return Response(status_code=200 if found else 404, headers={OFFSET_HEADER: str(num_bytes)})

    @router.put("/admin/blobs/{digest}", tags=["admin"], summary="Store a file of a fine-tune, or a part of it")
    async def put_blob(digest: str, request: Request) -> Response:
        opened = require_store(store)
        try:
            return await _receive(opened, digest, request, max_bytes=int(config.max_blob_gib * 2**30))
        except ClientDisconnect:
            return client_gone()
        except RootgraftError:
            await _read_to_end(request)  # else the client may not read why
            raise

    @router.get("/internal/blobs/{digest}", include_in_schema=False)
    async def get_blob(digest: str, request: Request) -> Response:
        check_worker(request, worker_token)
        try:
            blob = await asyncio.to_thread(require_store(store).get, digest)
        except InvalidRequestError as error:
            raise ModelNotFoundError(f"{error.message}; publish the version again", param="files") from None
        return BlobResponse(blob.path, media_type="application/octet-stream", headers={"etag": f'"{digest}"'})

    @router.get("/internal/versions", include_in_schema=False)
    async def list_versions(request: Request) -> Response:
        check_worker(request, worker_token)
        variants = await asyncio.to_thread(catalog.list_variants)
        digests = [variant.path for variant in variants if variant.files is not None]
        return Response(VersionsReply(manifest_digests=digests).model_dump_json(), media_type="application/json")

    return router


def require_store(store: Store | None) -> Store:
    if store is None:
        raise InvalidRequestError("this controller keeps no published files; start it with --store DIR")
    return store


async def _receive(store: Store, digest: str, request: Request, *, max_bytes: int) -> Response:
    offset = _number(request, OFFSET_HEADER) or 0
    length = _number(request, LENGTH_HEADER)
    if length is None and (body_length := _number(request, "content-length")) is not None:
        length = offset + body_length
    if length is not None and length > max_bytes:
        raise _too_large(max_bytes)
    with ExitStack() as held:
        receiver = await asyncio.to_thread(held.enter_context, store.receive(digest))
        if receiver.complete:
            await _read_to_end(request)
            return Response(status_code=200)
        if offset == 0:
            receiver.restart()
        elif offset != receiver.num_bytes:
            raise InvalidRequestError(
                f"{receiver.num_bytes} bytes of {digest} have come, so a part cannot begin at {offset}; continue there",
                param=OFFSET_HEADER,
            )
        if length is not None:
            _check_space(receiver, store.root, length - offset)
        await _write_body(receiver, request, max_bytes)
        if length is not None and receiver.num_bytes < length:
            return Response(status_code=202, headers={OFFSET_HEADER: str(receiver.num_bytes)})
        await asyncio.to_thread(receiver.finish)
        return Response(status_code=201)


async def _write_body(receiver: BlobReceiver, request: Request, max_bytes: int) -> None:
    """Raises ClientDisconnect when the body breaks off; what has come is kept."""
    buffer = bytearray()
    try:
        async for chunk in request.stream():
            buffer += chunk
            if receiver.num_bytes + len(buffer) > max_bytes:
                receiver.give_up()
                raise _too_large(max_bytes)
            if len(buffer) >= _WRITE_BYTES:
                await asyncio.to_thread(receiver.write, bytes(buffer))
                buffer.clear()
    except ClientDisconnect:
        await asyncio.to_thread(receiver.write, bytes(buffer))
        raise
    await asyncio.to_thread(receiver.write, bytes(buffer))


def _check_space(receiver: BlobReceiver, root: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(root).free
    if num_bytes > free:
        receiver.give_up()
        raise InternalError(
            f"no space left on the disk of {root}: {num_bytes / 1e6:.0f} MB are to come, {free / 1e6:.0f} MB are free; "
            "free some and try again"
        )


async def _read_to_end(request: Request) -> None:
    try:
        async for _ in request.stream():
            pass
    except (ClientDisconnect, RuntimeError):  # RuntimeError: it has been read already
        return


def _number(request: Request, header: str) -> int | None:
    text = request.headers.get(header)
    if text is None:
        return None
    if not text.isdecimal():
        raise InvalidRequestError(f"the header {header} is not a number", param=header)
    return int(text)


def _too_large(max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"a published file has at most {max_bytes} bytes; start the controller with a larger --max-blob-gib"
    )
