from __future__ import annotations

from tests.controller.openai.api import Api
from tests.fakes.fake_gateway import FakeGateway, FakeModel


async def test_models_are_listed_and_described(api: Api, gateway: FakeGateway) -> None:
    gateway.models_ = [
        FakeModel("a/b/c"),
        FakeModel("plain", max_model_len=10, created=5),
        FakeModel("sql", parent="plain"),
    ]
    listed = (await api.get("/v1/models")).json
    assert listed == {
        "object": "list",
        "data": [
            {
                "id": "a/b/c",
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "rootgraft",
                "root": "a/b/c",
                "parent": None,
                "max_model_len": 2048,
            },
            {
                "id": "plain",
                "object": "model",
                "created": 5,
                "owned_by": "rootgraft",
                "root": "plain",
                "parent": None,
                "max_model_len": 10,
            },
            {
                "id": "sql",
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "rootgraft",
                "root": "/adapters/sql",
                "parent": "plain",
                "max_model_len": 2048,
            },
        ],
    }
    for model in listed["data"]:
        assert (await api.get(f"/v1/models/{model['id']}")).json == model
    assert (await api.get("/v1/models/a%2Fb%2Fc")).json["id"] == "a/b/c"


async def test_absent_models(api: Api, gateway: FakeGateway) -> None:
    for path in ("/v1/models/absent", "/v1/models/org", "/v1/models/org/tiny/more", "/v1/models/"):
        reply = await api.get(path)
        assert reply.status == 404, path
        assert reply.error["code"] == "model_not_found"
    gateway.models_ = []
    assert (await api.get("/v1/models")).json == {"object": "list", "data": []}
