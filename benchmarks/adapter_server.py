"""Loading and moving a server's LoRA adapters over HTTP: vLLM's routes, and rootgraft's for administrators."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import aiohttp
from openai_client import RequestFailed
from random_adapters import AdapterSet

_LOADS_AT_ONCE = 4


class AdapterServer:
    """The part of a server's API that is about adapters.

    Raises, every method: RequestFailed, with what the server said.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def load(self, adapters: AdapterSet, root: Path) -> None:
        """Let it serve the adapters of a set, in place of what it had under their names."""
        paths = {name: str((root / name).absolute()) for name in adapters.names}
        names = iter(paths)

        async def loader() -> None:
            for name in names:
                body = {"lora_name": name, "lora_path": paths[name], "load_inplace": True}
                await self._call("POST", "/v1/load_lora_adapter", body)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_LOADS_AT_ONCE):
                    group.create_task(loader())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def unload(self, name: str) -> None:
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def move(self, name: str, verb: str) -> None:
        """`activate` or `evict`."""
        await self._call("POST", f"/admin/variants/{name}/{verb}")

    async def states(self, name: str) -> set[str]:
        """Of an adapter on its workers."""
        found = json.loads(await self._call("GET", f"/admin/variants/{name}"))
        return {on["status"]["state"] for on in found["workers"] if on["status"] is not None}

    async def loads_from_disk(self, adapters: AdapterSet) -> int:
        """Since the workers have them, of a set on all workers."""
        listed = json.loads(await self._call("GET", "/admin/variants"))["variants"]
        names = set(adapters.names)
        return sum(
            on["status"]["loads_total"]
            for variant in listed
            if variant["name"] in names
            for on in variant["workers"]
            if on["status"] is not None
        )

    async def _call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> str:
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                text = await response.text()
        except (TimeoutError, aiohttp.ClientError) as error:
            raise RequestFailed(f"{path}: {type(error).__name__}: {error}") from error
        if response.status >= 400:
            raise RequestFailed(f"{path}: HTTP {response.status}: {text[:300]}", status=response.status)
        return text
