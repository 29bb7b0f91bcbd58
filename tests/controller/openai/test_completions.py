from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion

from controller.openai.schemas_completions import MAX_PROMPTS
from controller.protocol import TextPrompt, TokensPrompt
from tests.controller.openai.api import MODEL, Api, Reply
from tests.fakes.fake_gateway import FakeGateway

TEXT = "Hello, wörld 😀"


def streamed_choices(reply: Reply) -> dict[int, dict[str, Any]]:
    """The chunks of each choice put together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in reply.chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] += values
    return choices


async def test_a_completion_is_an_openai_object(api: Api) -> None:
    reply = await api.complete()
    assert reply.status == 200
    completion = reply.json
    assert completion.pop("id") == reply.headers["x-request-id"]
    assert reply.headers["x-request-id"].startswith("cmpl-")
    assert type(completion.pop("created")) is int
    assert completion == {
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": None,
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": 7}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 4,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_the_official_type_accepts_the_object(api: Api) -> None:
    Completion.model_validate((await api.complete(logprobs=1, n=2)).json, strict=True)


async def test_max_tokens_is_16_by_default(api: Api, gateway: FakeGateway) -> None:
    await api.complete()
    await api.complete(max_tokens=None)
    assert [request.sampling.max_tokens for request in gateway.requests] == [16, 16]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2},
        {"echo": True},
        {"logprobs": 2},
        {"logprobs": 0, "echo": True},
        {"prompt": ["One", "Two", "Three"], "n": 2, "echo": True, "logprobs": 1},
    ],
)
async def test_a_stream_adds_up_to_the_completion(api: Api, fields: dict[str, Any]) -> None:
    whole = {
        choice["index"]: {name: choice[name] for name in ("text", "logprobs", "finish_reason")}
        for choice in (await api.complete(**fields)).json["choices"]
    }
    assert streamed_choices(await api.complete(**fields, stream=True)) == whole


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("a", [TextPrompt(text="a")]),
        ("", [TextPrompt(text="")]),
        (["a", "b"], [TextPrompt(text="a"), TextPrompt(text="b")]),
        ([1, 2], [TokensPrompt(token_ids=[1, 2])]),
        ([[1, 2], [3]], [TokensPrompt(token_ids=[1, 2]), TokensPrompt(token_ids=[3])]),
    ],
)
async def test_forms_of_prompt(api: Api, gateway: FakeGateway, prompt: Any, sent: list[Any]) -> None:
    assert (await api.complete(prompt=prompt)).status == 200
    assert [request.prompt for request in gateway.requests] == sent
    assert len({request.request_id for request in gateway.requests}) == len(sent)


@pytest.mark.parametrize(
    "prompt", [[], [[]], [[1], []], ["a", 1], [1, "a"], [[1], "a"], [True], [1.0], [-1], [[-1]], {}, 5]
)
async def test_wrong_prompts(api: Api, prompt: Any) -> None:
    reply = await api.complete(prompt=prompt)
    assert (reply.status, reply.error["param"]) == (400, "prompt")


async def test_choices_of_several_prompts_are_numbered_through(api: Api) -> None:
    reply = await api.complete(prompt=["One", "Three"], n=2, echo=True)
    assert [(choice["index"], choice["text"]) for choice in reply.json["choices"]] == [
        (0, f"One{TEXT}"),
        (1, f"One{TEXT}"),
        (2, f"Three{TEXT}"),
        (3, f"Three{TEXT}"),
    ]
    assert reply.json["usage"]["prompt_tokens"] == 8  # once a prompt, not once a choice
    assert reply.json["usage"]["completion_tokens"] == 16


async def test_the_number_of_prompts_is_bounded(api: Api, gateway: FakeGateway) -> None:
    gateway.pieces = ["x"] * 20  # together more events than wait at once
    assert (await api.complete(prompt=["a"] * MAX_PROMPTS)).status == 200
    assert len(streamed_choices(await api.complete(prompt=["a"] * MAX_PROMPTS, stream=True))) == MAX_PROMPTS
    reply = await api.complete(prompt=["a"] * (MAX_PROMPTS + 1))
    assert (reply.status, reply.error["param"]) == (400, "prompt")


async def test_logprobs_with_echo_cover_the_prompt(api: Api) -> None:
    logprobs = (await api.complete(prompt="ab", echo=True, logprobs=2, max_tokens=2)).json["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b", "Hello", ", "],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"b": -0.5, "t1": -1.5}, {"Hello": -0.5, "t1": -1.5}, {", ": -0.5, "t1": -1.5}],
        "text_offset": [0, 1, 2, 7],
    }


async def test_logprobs_0_are_of_the_sampled_token(api: Api) -> None:
    logprobs = (await api.complete(logprobs=0, max_tokens=1)).json["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"Hello": -0.5}]


async def test_prompt_logprobs_with_echo_keep_their_own_number(api: Api, gateway: FakeGateway) -> None:
    choice = (await api.complete(prompt="ab", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1)).json["choices"][
        0
    ]
    assert gateway.requests[0].sampling.prompt_logprobs == 3
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -0.5}, {"Hello": -0.5}]
    assert list(choice["prompt_logprobs"][1]) == ["98", "1001", "1002"]


async def test_best_of_repeats_n(api: Api) -> None:
    assert (await api.complete(n=2, best_of=2)).status == 200
    reply = await api.complete(best_of=2)
    assert (reply.status, reply.error["param"]) == (400, "best_of")


async def test_special_tokens_can_be_left_out(api: Api, gateway: FakeGateway) -> None:
    await api.complete(add_special_tokens=False)
    assert gateway.requests[0].prompt == TextPrompt(text="Once", add_special_tokens=False)
