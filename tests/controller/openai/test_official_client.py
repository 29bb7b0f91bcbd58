"""The `openai` Python package against the API."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from controller.protocol import ErrorEvent
from registry.errors import OverloadedError, RateLimitError
from tests.controller.openai.api import MODEL
from tests.fakes.fake_gateway import FakeGateway, reply_events
from tests.fakes.until import until

TEXT = "Hello, wörld 😀"
MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


async def test_chat(client: AsyncOpenAI) -> None:
    completion = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1)
    choice = completion.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (TEXT, "assistant", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == TEXT
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 4
    assert completion._request_id == completion.id


async def test_chat_stream(client: AsyncOpenAI) -> None:
    texts, finish_reasons, usage = ["", ""], [], None
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finish_reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [TEXT, TEXT]
    assert finish_reasons == ["stop", "stop"]
    assert usage is not None
    assert usage.completion_tokens == 8


async def test_the_clients_own_accumulator(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == TEXT


async def test_completions(client: AsyncOpenAI) -> None:
    completion = await client.completions.create(model=MODEL, prompt=["One", "Two"], echo=True, logprobs=1)
    assert [choice.text for choice in completion.choices] == [f"One{TEXT}", f"Two{TEXT}"]
    stream = await client.completions.create(model=MODEL, prompt=[1, 2], stream=True, max_tokens=2)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello, "
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_our_own_sampling_fields(client: AsyncOpenAI, gateway: FakeGateway) -> None:
    await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        logit_bias={"5": 10},
        extra_body={"top_k": 5, "min_p": 0.1, "ignore_eos": True, "priority": -1},
    )
    sampling = gateway.requests[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.ignore_eos, sampling.logit_bias) == (5, 0.1, True, {5: 10.0})
    assert sampling.priority == -1


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).created == 1_700_000_000
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("absent/model")


async def test_errors_have_their_classes(client: AsyncOpenAI, gateway: FakeGateway) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="absent", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as unsupported:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, reasoning_effort="low")
    assert unsupported.value.param == "reasoning_effort"
    gateway.refuse = RateLimitError("Too many.")
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)


async def test_the_client_retries_what_is_overloaded(client: AsyncOpenAI, gateway: FakeGateway) -> None:
    gateway.refuse = OverloadedError("Nobody is there.", retry_after_s=0.01)
    asking = asyncio.create_task(
        client.with_options(max_retries=3).chat.completions.create(model=MODEL, messages=MESSAGES)
    )
    await until(lambda: gateway.num_refused)
    gateway.refuse = None
    assert (await asking).choices[0].message.content == TEXT


async def test_an_error_in_a_stream_is_raised(client: AsyncOpenAI, gateway: FakeGateway) -> None:
    gateway.script = lambda request: [
        *reply_events(request, ["a", "b"])[:2],
        ErrorEvent(code="worker_failed", message="The worker broke off."),
    ]
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    assert [(await anext(stream)).choices[0].delta.content for _ in range(2)] == ["", "a"]
    with pytest.raises(openai.APIError, match=r"The worker broke off\.") as failed:
        await anext(stream)
    assert failed.value.code == "worker_failed"


async def test_closing_a_stream_cancels_it(client: AsyncOpenAI, gateway: FakeGateway) -> None:
    gateway.script = lambda request: [*reply_events(request, ["a", "b"])[:2], asyncio.Event()]
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: gateway.num_closed_early == 1)


async def test_the_synchronous_client(base_url: str) -> None:
    def ask() -> str:
        with OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == TEXT
