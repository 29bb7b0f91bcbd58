from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from controller.protocol import ChatMessage, ChatPrompt
from registry.errors import ContextLengthError, OverloadedError
from tests.controller.openai.api import MODEL, Api, Reply
from tests.fakes.fake_gateway import FakeGateway

TEXT = "Hello, wörld 😀"


def streamed_texts(reply: Reply) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in reply.chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return texts


async def test_a_completion_is_an_openai_object(api: Api) -> None:
    reply = await api.chat()
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    completion = reply.json
    assert completion["id"].startswith("chatcmpl-")
    assert reply.headers["x-request-id"] == completion["id"]
    assert type(completion["created"]) is int
    del completion["id"], completion["created"]
    assert completion == {
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": 7,
            }
        ],
        "usage": {
            "prompt_tokens": 8,
            "completion_tokens": 4,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


async def test_the_official_types_accept_object_and_chunks(api: Api) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "n": 2}
    ChatCompletion.model_validate((await api.chat(**fields)).json, strict=True)
    for chunk in (await api.chat(**fields, stream=True, stream_options={"include_usage": True})).chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)


async def test_streamed_text_is_the_text(api: Api, gateway: FakeGateway) -> None:
    gateway.pieces = ["a", "", '"quoted"\n', "\u2028\x85", "\x00\x1f", "end"]
    whole = {choice["index"]: choice["message"]["content"] for choice in (await api.chat(n=3)).json["choices"]}
    assert streamed_texts(await api.chat(n=3, stream=True)) == whole == dict.fromkeys(range(3), "".join(gateway.pieces))


async def test_a_stream_has_one_identity_one_role_and_one_finish_reason_a_choice(api: Api) -> None:
    reply = await api.chat(n=2, stream=True)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    chunks = reply.chunks
    assert {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks} == {
        (reply.headers["x-request-id"], chunks[0]["created"], MODEL, "chat.completion.chunk")
    }
    assert all("usage" not in chunk for chunk in chunks)
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert choices[-1]["delta"] == {}
        assert choices[-1]["stop_reason"] == 7


async def test_include_usage_adds_a_last_chunk(api: Api) -> None:
    *chunks, last = (await api.chat(stream=True, stream_options={"include_usage": True})).chunks
    assert chunks
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == (await api.chat()).json["usage"]


async def test_no_line_separator_of_any_client_is_in_a_chunk(api: Api, gateway: FakeGateway) -> None:
    gateway.pieces = ["a\u2028b\u2029c\x85d\x0be\r\nf"]
    reply = await api.chat(stream=True)
    assert reply.body.decode().splitlines() == reply.body.decode().split("\n")[:-1]
    assert streamed_texts(reply) == {0: gateway.pieces[0]}


async def test_logprobs(api: Api) -> None:
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    whole = (await api.chat(**fields)).json["choices"][0]
    hello = {"token": "Hello", "logprob": -0.5, "bytes": [72, 101, 108, 108, 111]}
    expected = {
        "content": [{**hello, "top_logprobs": [hello, {"token": "t1", "logprob": -1.5, "bytes": [116, 49]}]}],
        "refusal": None,
    }
    assert whole["logprobs"] == expected
    assert whole["finish_reason"] == "length"
    chunks = (await api.chat(**fields, stream=True)).chunks
    assert [chunk["choices"][0]["logprobs"] for chunk in chunks] == [None, expected, None]


async def test_logprobs_without_top_logprobs_are_of_the_sampled_token_only(api: Api, gateway: FakeGateway) -> None:
    choice = (await api.chat(logprobs=True)).json["choices"][0]
    assert [token["top_logprobs"] for token in choice["logprobs"]["content"]] == [[], [], [], []]
    assert gateway.requests[0].sampling.logprobs == 0


async def test_prompt_logprobs_are_vllms(api: Api) -> None:
    first, second, *_ = (await api.chat(prompt_logprobs=1)).json["prompt_logprobs"]
    assert first is None
    assert second == {"115": {"logprob": -0.5, "rank": 1, "decoded_token": "s"}}


async def test_messages_reach_the_worker(api: Api, gateway: FakeGateway) -> None:
    reply = await api.chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert reply.status == 200
    assert gateway.requests[0].prompt == ChatPrompt(
        messages=[
            ChatMessage(role="system", content="Be brief."),
            ChatMessage(role="user", content="a\nb", name="Ann"),
        ],
        add_generation_prompt=True,
        chat_template_kwargs={"enable_thinking": False},
    )


async def test_our_own_reply_can_be_sent_back(api: Api) -> None:
    official = ChatCompletion.model_validate((await api.chat()).json).choices[0].message.model_dump()
    for message in ((await api.chat()).json["choices"][0]["message"], official):
        reply = await api.chat(messages=[{"role": "user", "content": "Hi"}, message, {"role": "user", "content": "?"}])
        assert reply.status == 200, reply.body


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, (True, False)),
        ({"continue_final_message": True}, (False, True)),
        ({"continue_final_message": True, "add_generation_prompt": False}, (False, True)),
        ({"add_generation_prompt": False}, (False, False)),
    ],
)
async def test_final_message_fields(
    api: Api, gateway: FakeGateway, fields: dict[str, Any], prompt: tuple[bool, bool]
) -> None:
    assert (await api.chat(**fields)).status == 200
    sent = gateway.requests[0].prompt
    assert isinstance(sent, ChatPrompt)
    assert (sent.add_generation_prompt, sent.continue_final_message) == prompt


async def test_max_tokens_under_both_names(api: Api, gateway: FakeGateway) -> None:
    for fields in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 2, "max_completion_tokens": 2}, {}):
        assert (await api.chat(**fields)).status == 200
    assert [request.sampling.max_tokens for request in gateway.requests] == [2, 2, 2, None]


async def test_turns_of_a_conversation_have_one_affinity(api: Api, gateway: FakeGateway) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    later = [*turns, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]
    await api.chat(messages=turns)
    await api.chat(messages=later)
    await api.chat(messages=[turns[0], {"role": "user", "content": "other"}])
    await api.chat(messages=turns, prompt_cache_key="mine")
    first, second, third, fourth = gateway.affinities
    assert first == second != third
    assert fourth == "mine"


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_event_are_http_errors(api: Api, gateway: FakeGateway, stream: bool) -> None:
    assert (await api.chat(model="absent", stream=stream)).status == 404
    gateway.refuse = OverloadedError("Nobody is there.", retry_after_s=2.5)
    reply = await api.chat(stream=stream)
    assert (reply.status, reply.headers["retry-after"], reply.error["code"]) == (503, "3", "overloaded")
    gateway.refuse = ContextLengthError("Too long.", param="messages")
    reply = await api.chat(stream=stream)
    assert reply.status == 400
    assert reply.headers["content-type"] == "application/json"
    assert reply.error == {
        "message": "Too long.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }


async def test_chunks_are_compact_utf_8(api: Api) -> None:
    reply = await api.chat(stream=True)
    assert "wörld".encode() in reply.body
    for payload in reply.data[:-1]:
        assert payload == json.dumps(json.loads(payload), ensure_ascii=False, separators=(",", ":"))
