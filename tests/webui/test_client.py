from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.fake_openai_server import FakeOpenAIServer
from tests.fakes.until import until
from webui.client import ApiClient, ApiError, Chunk, SamplingOptions, Usage

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture
async def server() -> AsyncIterator[FakeOpenAIServer]:
    async with FakeOpenAIServer() as server:
        yield server


@pytest.fixture
async def client(server: FakeOpenAIServer) -> AsyncIterator[ApiClient]:
    client = ApiClient(server.url)
    yield client
    await client.close()


async def chunks_of(client: ApiClient, options: SamplingOptions | None = None) -> list[Chunk]:
    return [chunk async for chunk in client.stream_chat("tiny-chat", HELLO, options or SamplingOptions())]


async def test_lists_models_before_their_adapters(client: ApiClient, server: FakeOpenAIServer) -> None:
    server.models = ["model", "adapter", "other-model"]
    assert await client.list_models() == server.models


async def test_streams_text_the_reason_of_the_end_and_usage(client: ApiClient) -> None:
    chunks = await chunks_of(client)
    assert "".join(chunk.text for chunk in chunks) == "You said: hello there "
    assert chunks[-2:] == [Chunk(finish_reason="stop"), Chunk(usage=Usage(7, 4))]


async def test_characters_and_lines_may_be_large(client: ApiClient, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["é日本\n\u2028 " * 50_000]
    assert (await chunks_of(client))[0].text == "é日本\n\u2028 " * 50_000


async def test_the_request_holds_what_was_chosen_and_nothing_that_is_off(
    client: ApiClient, server: FakeOpenAIServer
) -> None:
    await chunks_of(client, SamplingOptions())
    await chunks_of(
        client, SamplingOptions(temperature=0, top_k=5, min_p=0.1, seed=0, stop=("a", "b"), max_tokens=None)
    )
    always = {
        "model": "tiny-chat",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert server.requests == [
        always | {"temperature": 0.7, "max_tokens": 512},
        always | {"temperature": 0, "top_k": 5, "min_p": 0.1, "seed": 0, "stop": ["a", "b"]},
    ]


async def test_the_api_key_is_sent(server: FakeOpenAIServer) -> None:
    client = ApiClient(server.url + "/v1/", api_key="sk-1")
    await client.list_models()
    await chunks_of(client)
    await client.close()
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-1", "Bearer sk-1"]


async def test_closing_the_generator_closes_the_connection(client: ApiClient, server: FakeOpenAIServer) -> None:
    server.reply = lambda body: ["word "] * 100_000
    stream = client.stream_chat("tiny-chat", HELLO, SamplingOptions())
    await anext(stream)
    await stream.aclose()
    await until(lambda: server.num_disconnects == 1)


async def test_an_error_in_the_middle_of_a_stream_keeps_what_came_before(
    client: ApiClient, server: FakeOpenAIServer
) -> None:
    server.error_after = 2
    stream = client.stream_chat("tiny-chat", HELLO, SamplingOptions())
    assert (await anext(stream)).text + (await anext(stream)).text == "You said: "
    with pytest.raises(ApiError, match=r"The worker failed\."):
        await anext(stream)


@pytest.mark.parametrize("position", [0, 2])
async def test_a_connection_that_breaks_off_is_an_error(
    client: ApiClient, server: FakeOpenAIServer, position: int
) -> None:
    server.break_after = position
    with pytest.raises(ApiError, match="broke off"):
        await chunks_of(client)


async def test_an_end_without_done_is_an_error(client: ApiClient, server: FakeOpenAIServer) -> None:
    server.refuse_with = (200, b'data: {"choices": []}\n\n')
    with pytest.raises(ApiError, match="broke off"):
        await chunks_of(client)


async def test_a_server_that_is_away_and_returns(client: ApiClient, server: FakeOpenAIServer) -> None:
    await server.stop()
    with pytest.raises(ApiError, match="cannot be reached"):
        await client.list_models()
    with pytest.raises(ApiError, match="cannot be reached"):
        await chunks_of(client)
    await server.start()
    assert await client.list_models() == ["tiny-chat", "tiny-code"]
    assert await chunks_of(client)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b'{"error": {"message": "No model x."}}', "No model x."),
        (401, b'{"error": {"message": "Wrong key."}}', "Wrong key."),
        (502, b"<html>bad gateway</html>", "502"),
        (503, b'{"error": "text"}', "503"),
        (500, b"null", "500"),
    ],
)
async def test_refusals_become_a_sentence(
    client: ApiClient, server: FakeOpenAIServer, status: int, body: bytes, message: str
) -> None:
    server.refuse_with = (status, body)
    for call in (client.list_models(), chunks_of(client)):
        with pytest.raises(ApiError, match=message):
            await call


@pytest.mark.parametrize("body", [b"null", b"[]", b'{"data": [1]}', b"<html>"])
async def test_a_server_of_another_kind_is_named(client: ApiClient, server: FakeOpenAIServer, body: bytes) -> None:
    server.refuse_with = (200, body)
    with pytest.raises(ApiError, match="--controller"):
        await client.list_models()


@pytest.mark.parametrize("data", [b"no json", b"[]", b'{"choices": [{}]}', b'{"choices": 3}', b'{"usage": 1}'])
async def test_a_stream_of_another_kind_is_named(client: ApiClient, server: FakeOpenAIServer, data: bytes) -> None:
    server.refuse_with = (200, b"data: " + data + b"\n\n")
    with pytest.raises(ApiError, match="--controller"):
        await chunks_of(client)
