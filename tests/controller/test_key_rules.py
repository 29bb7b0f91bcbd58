from __future__ import annotations

import pytest

from controller.auth import Principal
from controller.config import LimitsConfig
from controller.key_rules import COMBINATIONS_WINDOW_S, KeyRules
from controller.protocol import LoraWeight
from registry.catalog import Catalog
from registry.errors import PermissionDeniedError, RateLimitError
from tests.controller.conftest import StartController
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_variants import FakeVariants, digest
from tests.fakes.fake_worker import FakeWorker

USER, OTHER = Principal("key_1", "user", admin=False), Principal("key_2", "other", admin=False)
ADMIN = Principal("key_3", "admin", admin=True)


def mixed(scale: float, *names: str) -> list[LoraWeight]:
    return [LoraWeight(name=name, scale=scale) for name in names or ("sql",)]


def test_only_admin_keys_may_be_more_urgent_than_the_operator_allows() -> None:
    rules = KeyRules(LimitsConfig(min_priority=-2), FakeClock())
    for principal, priority in ((USER, -2), (USER, 5), (ADMIN, -1000), (None, -1000)):
        rules.check(principal, "m", [], priority)
    with pytest.raises(PermissionDeniedError, match="a priority of -2 or more") as caught:
        rules.check(USER, "m", [], -3)
    assert caught.value.param == "priority"


def test_a_key_may_use_so_many_combinations_at_a_time() -> None:
    clock = FakeClock()
    rules = KeyRules(LimitsConfig(max_lora_combinations_per_key=2), clock)
    rules.check(USER, "m", mixed(0.1, "sql", "chat"), 0)
    clock.advance(10)
    rules.check(USER, "m", mixed(0.2), 0)
    for same in (mixed(0.1, "chat", "sql"), mixed(1.0), []):  # in another order; no combination; none
        rules.check(USER, "m", same, 0)
    with pytest.raises(RateLimitError, match="2 combinations") as caught:
        rules.check(USER, "m", mixed(0.3), 0)
    assert caught.value.retry_after_s == COMBINATIONS_WINDOW_S  # both were used just now
    for principal in (OTHER, ADMIN, None):
        rules.check(principal, "m", mixed(0.3), 0)
    clock.advance(COMBINATIONS_WINDOW_S + 1)
    rules.check(USER, "m", mixed(0.3), 0)


async def test_keys_of_requests(start_controller: StartController, catalog: Catalog) -> None:
    controller = await start_controller(auth="required", max_lora_combinations_per_key=1)
    keys = {role: catalog.create_api_key(role, role=role, actor="test")[1] for role in ("user", "admin")}

    async def ask(role: str, route: str = "completions", **fields: object) -> tuple[int, str | None]:
        prompt = {"messages": [{"role": "user", "content": "x"}]} if route == "chat/completions" else {"prompt": "x"}
        headers = {"authorization": f"Bearer {keys[role]}"}
        body = {"model": "m", **prompt, **fields}
        response = await controller.post(f"/v1/{route}", json=body, headers=headers)
        error = (await response.json()).get("error")
        return response.status, None if error is None else error["param"]

    variants = FakeVariants(files={"sql": digest("sql")})
    variants.from_command_line("sql", "sql")
    async with FakeWorker(variants=variants) as worker:
        await worker.register(controller.url)
        for route in ("completions", "chat/completions"):
            assert await ask("user", route, priority=-1) == (403, "priority")
            assert await ask("admin", route, priority=-1) == (200, None)
            assert await ask("user", route, priority=1) == (200, None)
            assert await ask("user", route, loras=[{"name": "sql", "scale": 0.5}]) == (200, None)
            assert await ask("user", route, loras=[{"name": "sql", "scale": 0.25}]) == (429, "loras")
    assert [request.sampling.priority for request in worker.requests] == [-1, 1, 0] * 2
