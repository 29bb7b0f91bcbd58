"""What bodies are refused, with which `param`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.controller.openai.api import CHAT, COMPLETIONS, MODEL, Api
from tests.fakes.fake_gateway import FakeGateway

USER = {"role": "user", "content": "Hi"}

WRONG_IN_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"model": 1}, "model"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "1"}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.0}, "n"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"01": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": 1}, "stop_token_ids"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"skip_special_tokens": 0}, "skip_special_tokens"),
    ({"priority": 1001}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"loras": [{"name": "sql", "scale": 101}]}, "loras[0].scale"),
    ({"loras": [{"name": "sql", "scale": -1e308}]}, "loras[0].scale"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"surprise": 1}}, "stream_options.surprise"),
    ({"user": 1}, "user"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"surprise": 1}, "surprise"),
]

WRONG_IN_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "function", "content": "1", "name": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "1"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "", "refusal": "no"}]}, "messages[0].refusal"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": [{**USER, "surprise": 1}]}, "messages[0].surprise"),
    ({"messages": [{**USER, "name": ""}]}, "messages[0].name"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 1, "max_tokens": 2}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": []}, "functions"),
    ({"function_call": "none"}, "function_call"),
    ({"audio": {}}, "audio"),
    ({"prediction": {}}, "prediction"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"echo": True}, "echo"),
    ({"prompt": "Hi"}, "prompt"),
    ({"suffix": "x"}, "suffix"),
]

WRONG_IN_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"suffix": ""}, "suffix"),
    ({"messages": [USER]}, "messages"),
    ({"max_completion_tokens": 1}, "max_completion_tokens"),
]

HARMLESS_IN_BOTH: dict[str, Any] = {
    "n": 1,
    "temperature": 0,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "logit_bias": {"5": -100, "0": 1.5},
    "seed": -(2**63),
    "stop": [],
    "stop_token_ids": [],
    "priority": -5,
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
}


@pytest.mark.parametrize(("fields", "param"), WRONG_IN_BOTH + WRONG_IN_CHAT)
async def test_refused_in_chat(api: Api, gateway: FakeGateway, fields: dict[str, Any], param: str) -> None:
    reply = await api.chat(**fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert (reply.error["type"], reply.error["code"]) == ("invalid_request_error", "invalid_request")
    assert param in reply.error["message"] or "messages of role" in reply.error["message"] or "content" in param
    assert not gateway.requests


@pytest.mark.parametrize(("fields", "param"), WRONG_IN_BOTH + WRONG_IN_COMPLETIONS)
async def test_refused_in_completions(api: Api, gateway: FakeGateway, fields: dict[str, Any], param: str) -> None:
    reply = await api.complete(**fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert not gateway.requests


async def test_harmless_fields_are_accepted(api: Api, gateway: FakeGateway) -> None:
    chat = {
        "logprobs": False,
        "top_logprobs": 0,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "safety_identifier": "me",
    }
    for reply in (await api.chat(**HARMLESS_IN_BOTH, **chat), await api.complete(**HARMLESS_IN_BOTH)):
        assert reply.status == 200, reply.body
    for request in gateway.requests:
        assert request.sampling.top_k == 0
        assert request.sampling.logit_bias == {5: -100.0, 0: 1.5}
        assert request.sampling.seed == -(2**63)


async def test_null_is_the_default(api: Api, gateway: FakeGateway) -> None:
    nulls = dict.fromkeys(
        (
            "n",
            "temperature",
            "top_p",
            "logit_bias",
            "seed",
            "stop",
            "stream",
            "stream_options",
            "max_tokens",
            "logprobs",
        )
    )
    chat = dict.fromkeys(
        ("tools", "tool_choice", "response_format", "reasoning_effort", "store", "audio", "top_logprobs")
    )
    assert (await api.chat(**nulls, **chat)).status == 200
    assert (await api.chat()).status == 200
    assert (await api.complete(**nulls, suffix=None, best_of=None)).status == 200
    first, second, _ = gateway.requests
    assert first.sampling == second.sampling


async def test_a_string_is_a_list_of_one_stop(api: Api, gateway: FakeGateway) -> None:
    await api.chat(stop="END")
    assert gateway.requests[0].sampling.stop == ["END"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"model": "org/tiny", "prompt": "a"} trailing',
        b'{"model": "org/tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "org/tiny", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "org/tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "org/tiny", "prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
        b'{"model": "org/tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"model": "org/tiny", "prompt": "\\ud800"}',
        b'{"model": "org/tiny", "prompt": "\\udc00\\ud800"}',
        b'{"model": "org/tiny", "prompt": "\xff"}',
        b'{"model": "org/tiny", "prompt": "\xed\xa0\x80"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
async def test_bodies_that_are_not_strict_json(api: Api, body: bytes) -> None:
    reply = await api.post(COMPLETIONS, body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b'[{"b": -1e999}]'])
async def test_no_infinite_number_reaches_a_template(api: Api, number: bytes) -> None:
    body = b'{"model":"org/tiny","messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"a":%b}}' % number
    assert (await api.post(CHAT, body)).status == 400
    assert (await api.post(CHAT, body.replace(number, b"1.5"))).status == 200


async def test_other_content_types_are_refused(api: Api) -> None:
    """A page in a browser may send these to a controller on loopback without the user's leave."""
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = await api.post(COMPLETIONS, body, Content_Type=media_type)
        assert reply.status == 400
        assert "Content-Type: application/json" in reply.error["message"]
    assert (await api.post(COMPLETIONS, body, Content_Type="Application/JSON; charset=utf-8")).status == 200


async def test_messages_about_long_values_are_short(api: Api) -> None:
    for fields in ({"n": "x" * 10_000}, {"x" * 10_000: 1}):
        assert len((await api.complete(**fields)).error["message"]) < 250


async def test_astral_characters_and_escapes_pass(api: Api, gateway: FakeGateway) -> None:
    await api.post(COMPLETIONS, b'{"model":"org/tiny","prompt":"\\ud83d\\ude00\\u0000"}')
    assert gateway.requests[0].prompt.text == "\U0001f600\x00"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"Paris": 1}}, "the keys of logit_bias are token ids, as \"42\", not 'Paris'."),
        ({"messages": []}, "messages must not be empty."),
        ({"messages": ["Hi"]}, "messages[0] should be an object, got 'Hi'."),
        (
            {"messages": [{"role": "assistant", "content": "Hi", "annotations": [{"type": "url_citation"}]}]},
            "messages[0].annotations must be empty.",
        ),
        ({"stop": ["a"] * 17}, "stop must hold at most 16 items, not 17."),
        ({"response_format": "json"}, "response_format should be an object, got 'json'."),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format of type json_schema is not supported: this server does not constrain answers; leave it "
            "out, ask for JSON in the messages, and check the answer.",
        ),
    ],
)
async def test_messages_say_what_to_do(api: Api, fields: dict[str, Any], message: str) -> None:
    assert (await api.chat(**fields)).error["message"] == message
