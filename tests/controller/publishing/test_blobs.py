from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import aiohttp
import pytest

from controller.publishing import blobs as blobs_module
from registry.names import ModelName
from registry.published_files import PublishedFiles
from registry.store import Store
from tests.controller.conftest import RunningController, StartController

DATA = bytes(range(256)) * 40
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


@pytest.fixture
async def controller(start_controller: StartController, tmp_path: Path) -> RunningController:
    return await start_controller(store=str(tmp_path / "store"), max_blob_gib=1e-4)


async def put(
    controller: RunningController, data: bytes, digest: str = DIGEST, **headers: str
) -> aiohttp.ClientResponse:
    return await controller._request(
        "PUT", f"/admin/blobs/{digest}", {"data": data, "headers": {k.replace("_", "-"): v for k, v in headers.items()}}
    )


async def head(controller: RunningController, digest: str = DIGEST) -> tuple[int, str]:
    response = await controller.head(f"/admin/blobs/{digest}")
    return response.status, response.headers["upload-offset"]


async def message(response: aiohttp.ClientResponse) -> str:
    return str((await response.json())["error"]["message"])


async def test_a_file_is_put_once_and_workers_get_it(controller: RunningController) -> None:
    assert await head(controller) == (404, "0")
    assert (await put(controller, DATA)).status == 201
    assert (await put(controller, DATA)).status == 200
    assert await head(controller) == (200, str(len(DATA)))
    url = f"{controller.url}/internal/blobs/{DIGEST}"
    async with controller.client.get(url) as whole:
        assert (whole.status, await whole.read()) == (200, DATA)
    async with controller.client.get(url, headers={"range": "bytes=1000-"}) as rest:
        assert (rest.status, await rest.read()) == (206, DATA[1000:])


async def test_parts_are_put_one_after_the_other(controller: RunningController) -> None:
    length = str(len(DATA))
    response = await put(controller, DATA[:4000], upload_length=length)
    assert (response.status, response.headers["upload-offset"]) == (202, "4000")
    assert await head(controller) == (404, "4000")
    assert (await controller.get(f"/internal/blobs/{DIGEST}")).status == 404
    refused = await put(controller, DATA[5000:], upload_offset="5000", upload_length=length)
    assert "4000 bytes of" in await message(refused)
    assert (await put(controller, DATA[4000:], upload_offset="4000", upload_length=length)).status == 201


async def test_an_upload_that_breaks_off_goes_on(controller: RunningController) -> None:
    async def broken() -> object:
        yield DATA[:3000]
        raise ConnectionResetError

    with pytest.raises((aiohttp.ClientError, ConnectionResetError)):
        await put(controller, broken(), upload_length=str(len(DATA)))  # type: ignore[arg-type]
    while True:
        status, offset = await head(controller)
        assert status == 404
        rest = await put(controller, DATA[int(offset) :], upload_offset=offset, upload_length=str(len(DATA)))
        if rest.status != 503:  # else the controller is still at what broke off
            break
        await asyncio.sleep(0.01)
    assert rest.status == 201


async def test_other_bytes_are_refused_and_nothing_is_kept(controller: RunningController, tmp_path: Path) -> None:
    assert "hash to sha256:" in await message(await put(controller, DATA[:-1] + b"x"))
    assert await head(controller) == (404, "0")
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


async def test_bounds(controller: RunningController, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = bytes(200_000)
    assert (await put(controller, large)).status == 413
    assert (await put(controller, b"", upload_length="200000")).status == 413
    assert (await put(controller, DATA, digest="sha256:../../x")).status in (400, 404)
    assert "is no digest" in await message(await put(controller, DATA, digest="sha256:xyz"))
    assert "not a number" in await message(await put(controller, DATA, upload_offset="-1"))
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(blobs_module.shutil, "disk_usage", lambda _: usage)
    response = await put(controller, DATA)
    assert response.status == 500
    assert "no space left on the disk" in await message(response)
    assert list(Store(tmp_path / "store").blobs()) == []


async def test_who_may(start_controller: StartController, tmp_path: Path) -> None:
    controller = await start_controller(store=str(tmp_path / "store"), auth="required", worker_token="secret")
    assert (await put(controller, DATA)).status == 401
    assert (await controller.get(f"/internal/blobs/{DIGEST}")).status == 401
    found = await controller.get(f"/internal/blobs/{DIGEST}", headers={"x-rootgraft-worker-token": "secret"})
    assert found.status == 404


async def test_without_a_store(start_controller: StartController) -> None:
    controller = await start_controller()
    assert "start it with --store DIR" in await message(await put(controller, DATA))


async def test_workers_learn_which_versions_they_need(controller: RunningController) -> None:
    files = PublishedFiles({"adapter_config.json": DIGEST})
    catalog = controller.state.catalog
    catalog.add_variant("other", parent="m", path="there", actor="test")
    version = catalog.add_version("bot", parent="m", files=files, actor="test")

    async def needed() -> list[str]:
        return list((await (await controller.get("/internal/versions")).json())["manifest_digests"])

    assert await needed() == [files.manifest_digest]
    catalog.set_version_state(ModelName("bot", version=version.number), "failed", error="it is bad", actor="test")
    assert await needed() == []
