from __future__ import annotations

import json

from controller.fingerprint import fingerprint
from controller.protocol import LoraWeight
from tests.controller.conftest import StartController
from tests.fakes.fake_variants import FakeVariants, digest
from tests.fakes.fake_worker import FakeWorker

CHAT = {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}
SQL = f"fp_{digest('sql').removeprefix('sha256:')[:12]}"


async def test_clients_see_which_files_answered(start_controller: StartController) -> None:
    controller = await start_controller()
    async with FakeWorker(variants=FakeVariants(files={"sql": digest("sql"), "chess": digest("chess")})) as worker:
        await worker.register(controller.url)
        for name in ("sql", "chess"):
            reply = await controller.post("/admin/variants", json={"name": name, "path": name})
            assert reply.status == 200, await reply.text()
        whole = await (await controller.post("/v1/chat/completions", json=CHAT)).json()
        assert whole["system_fingerprint"] == SQL
        stream = await (await controller.post("/v1/chat/completions", json={**CHAT, "stream": True})).text()
        chunks = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
        assert {chunk["system_fingerprint"] for chunk in chunks} == {SQL}

        (known,) = controller.state.workers

        def of(*parts: tuple[str, float]) -> str | None:
            return fingerprint(known, "m", [LoraWeight(name=name, scale=scale) for name, scale in parts])

        assert of(("sql", 1.0)) == SQL
        assert of(("sql", 1.0), ("chess", 0.5)) == of(("chess", 0.5), ("sql", 1.0))
        assert len({of(("sql", 1.0)), of(("sql", 0.5)), of(("sql", 1.0), ("chess", 0.5)), of(("chess", 1.0))}) == 4
        assert of(("unknown", 1.0)) is None
        assert of(("unknown", 1.0), ("sql", 1.0)) is None
