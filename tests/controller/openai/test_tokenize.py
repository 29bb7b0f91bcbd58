from __future__ import annotations

from typing import Any

import pytest

from controller.protocol import ChatPrompt, TextPrompt
from tests.controller.openai.api import MODEL, Api
from tests.fakes.fake_gateway import FakeGateway, FakeModel

MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_text(api: Api, gateway: FakeGateway) -> None:
    reply = await api.post("/tokenize", {"model": MODEL, "prompt": "ab"})
    assert reply.json == {"count": 2, "max_model_len": 2048, "tokens": [97, 98], "token_strs": None}
    reply = await api.post(
        "/tokenize", {"model": MODEL, "prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
    )
    assert reply.json["token_strs"] == ["a", "b"]
    assert [request.prompt for request in gateway.tokenize_requests] == [
        TextPrompt(text="ab"),
        TextPrompt(text="ab", add_special_tokens=False),
    ]


async def test_conversation(api: Api, gateway: FakeGateway) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": MESSAGES}
    assert (await api.post("/tokenize", body)).json["count"] == 8
    more = {"continue_final_message": True, "add_special_tokens": False, "chat_template_kwargs": {"a": 1}}
    assert (await api.post("/tokenize", {**body, **more})).status == 200
    first, second = [request.prompt for request in gateway.tokenize_requests]
    assert isinstance(first, ChatPrompt)
    assert first.add_generation_prompt
    assert isinstance(second, ChatPrompt)
    assert not second.add_generation_prompt
    assert second.continue_final_message
    assert second.chat_template_kwargs == {"a": 1}


async def test_detokenize(api: Api) -> None:
    reply = await api.post("/detokenize", {"model": MODEL, "tokens": [97, 98]})
    assert reply.json == {"prompt": "ab"}
    assert (await api.post("/detokenize", {"model": MODEL, "tokens": []})).json == {"prompt": ""}


async def test_the_model_may_be_left_out_where_there_is_one(api: Api, gateway: FakeGateway) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})]
    for models, status in (([], 400), ([FakeModel("a")], 200), ([FakeModel("a"), FakeModel("b")], 400)):
        gateway.models_ = models
        for path, body in bodies:
            reply = await api.post(path, body)
            assert reply.status == status
            assert status == 200 or reply.error["param"] == "model"
            assert (await api.post(path, {**body, "model": "absent"})).status == 404


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "surprise": True}, "surprise"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1.0]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
    ],
)
async def test_wrong_bodies(api: Api, path: str, body: dict[str, Any], param: str) -> None:
    reply = await api.post(path, body)
    assert (reply.status, reply.error["param"]) == (400, param)
