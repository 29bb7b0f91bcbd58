from __future__ import annotations

import asyncio
import json

import pytest

from tests.controller.conftest import RunningController, StartController

BOTH = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n"
)


async def exchange(controller: RunningController, request: bytes) -> tuple[bytes, bytes]:
    """Send raw bytes and read until the server closes: header and body of what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", controller.port)
    writer.write(request)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize(
    "request_bytes",
    [
        BOTH,
        BOTH.replace(b"Transfer-Encoding", b"tRANSFER-eNCODING"),
        BOTH.replace(b"/v1/completions", b"/health"),
    ],
)
async def test_both_framings_at_once_are_refused_and_the_connection_is_closed(
    start_controller: StartController, request_bytes: bytes
) -> None:
    controller = await start_controller()
    head, body = await exchange(controller, request_bytes)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "invalid_request"  # one answer: the smuggled request got none


async def test_one_framing_is_fine(start_controller: StartController) -> None:
    controller = await start_controller()
    for framing, payload in ((b"Content-Length: 2", b"{}"), (b"Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n")):
        request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        _, body = await exchange(controller, request + framing + b"\r\n\r\n" + payload)
        assert json.loads(body)["error"]["param"] == "model"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_an_error_object(start_controller: StartController, request_bytes: bytes) -> None:
    controller = await start_controller()
    head, body = await exchange(controller, request_bytes)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_a_body_that_breaks_midway_closes_the_connection_and_nothing_else(
    start_controller: StartController,
) -> None:
    controller = await start_controller()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nNOT HEX\r\n"
    await exchange(controller, request)
    assert (await controller.get("/health")).status == 200
