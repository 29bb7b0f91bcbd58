from __future__ import annotations

import pytest

from controller.auth import CACHE_S, Authenticator, Principal, keys_required
from controller.config import AuthConfig
from registry.catalog import Catalog
from registry.errors import AuthenticationError, PermissionDeniedError
from tests.controller.conftest import StartController
from tests.fakes.fake_worker import FakeWorker

USER = Principal("key_1", "ann", admin=False)
ADMIN = Principal("key_2", "op", admin=True)


class KeyStore:
    def __init__(self) -> None:
        self.keys = {"user": USER, "admin": ADMIN}
        self.num_lookups = 0

    def find(self, secret: str) -> Principal | None:
        self.num_lookups += 1
        return self.keys.get(secret)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def authenticator(store: KeyStore, *, required: bool = True, metrics_open: bool = False, clock: Clock | None = None):
    return Authenticator(store.find, required=required, metrics_open=metrics_open, clock=clock or Clock())


@pytest.mark.parametrize(
    ("auth", "host", "required"),
    [
        ("auto", "127.0.0.1", False),
        ("auto", "localhost", False),
        ("auto", "::1", False),
        ("auto", "0.0.0.0", True),
        ("auto", "192.168.1.2", True),
        ("auto", "models.example.org", True),
        ("off", "0.0.0.0", False),
        ("required", "127.0.0.1", True),
    ],
)
def test_what_auth_means(auth: str, host: str, required: bool) -> None:
    assert keys_required(AuthConfig(auth=auth), host) is required


@pytest.mark.parametrize(
    ("path", "access"),
    [
        ("/health", "open"),
        ("/internal/workers/register", "open"),
        ("/admin/workers", "admin"),
        ("/admin", "admin"),
        ("/metrics", "admin"),
        ("/v1/models", "key"),
        ("/tokenize", "key"),
        ("/health/../v1/models", "key"),
        ("/nowhere", "key"),
    ],
)
def test_what_each_path_needs(path: str, access: str) -> None:
    assert authenticator(KeyStore()).access(path) == access
    assert authenticator(KeyStore(), required=False).access(path) == "open"


def test_metrics_are_open_on_loopback() -> None:
    assert authenticator(KeyStore(), metrics_open=True).access("/metrics") == "open"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic user", "user", "Bearer wrong", "Bearer \udcff"]
)
async def test_no_key_or_a_wrong_one_is_refused(header: str | None) -> None:
    with pytest.raises(AuthenticationError):
        await authenticator(KeyStore()).authenticate("/v1/models", header)


async def test_keys_open_what_they_are_for() -> None:
    subject = authenticator(KeyStore())
    assert await subject.authenticate("/v1/models", "Bearer user") == USER
    assert await subject.authenticate("/v1/models", "bearer  admin") == ADMIN
    assert await subject.authenticate("/admin/workers", "Bearer admin") == ADMIN
    with pytest.raises(PermissionDeniedError):
        await subject.authenticate("/admin/workers", "Bearer user")
    with pytest.raises(PermissionDeniedError):
        await subject.authenticate("/metrics", "Bearer user")


async def test_lookups_are_cached_briefly_and_revocation_takes_effect() -> None:
    store, clock = KeyStore(), Clock()
    subject = authenticator(store, clock=clock)
    for _ in range(5):
        await subject.authenticate("/v1/models", "Bearer user")
    assert store.num_lookups == 1
    del store.keys["user"]
    clock.now += CACHE_S
    with pytest.raises(AuthenticationError):
        await subject.authenticate("/v1/models", "Bearer user")
    for _ in range(5):
        with pytest.raises(AuthenticationError):
            await subject.authenticate("/v1/models", "Bearer user")
    assert store.num_lookups == 2


async def test_keys_of_the_catalog_over_http(start_controller: StartController, catalog: Catalog) -> None:
    _, user = catalog.create_api_key("ann", role="user", actor="cli:me")
    _, admin = catalog.create_api_key("op", role="admin", actor="cli:me")
    key, revoked = catalog.create_api_key("bob", role="user", actor="cli:me")
    catalog.revoke_api_key(key.id, actor="cli:me")
    controller = await start_controller(host="0.0.0.0")

    async def status(path: str, secret: str | None) -> int:
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        response = await controller.get(path, headers=headers)
        if response.status >= 400:
            error = (await response.json())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (
                error["code"] == {401: "invalid_api_key", 403: "permission_denied", 404: "not_found"}[response.status]
            )
        assert ("www-authenticate" in response.headers) == (response.status == 401)
        return response.status

    expected = {
        "/health": (200, 200, 200, 200),
        "/v1/models": (401, 401, 200, 200),
        "/nowhere": (401, 401, 404, 404),
        "/openapi.json": (401, 401, 200, 200),
        "/metrics": (401, 401, 403, 200),
        "/admin/workers": (401, 401, 403, 200),
    }
    for path, statuses in expected.items():
        assert tuple([await status(path, secret) for secret in (None, revoked, user, admin)]) == statuses, path
    async with FakeWorker() as worker:
        assert (await worker.register(controller.url)).status == 200  # workers have a token of their own
    text = await (await controller.get("/metrics", headers={"authorization": f"Bearer {admin}"})).text()
    assert 'rootgraft_requests_rejected_total{status="401"} 10.0' in text


async def test_on_loopback_everything_is_open(start_controller: StartController) -> None:
    controller = await start_controller()
    for path in ("/v1/models", "/metrics", "/admin/workers"):
        assert (await controller.get(path, headers={"authorization": "Bearer EMPTY"})).status == 200
