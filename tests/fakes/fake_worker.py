"""A model worker without a model: speaks controller/protocol.py over a real loopback socket and follows a script.

    async with FakeWorker("w1", Script(deltas=("Hel", "lo"))) as worker:
        await worker.register(controller_url)

Each generate request takes the next of `worker.scripts`, or `worker.script` when there is none left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import aiohttp
from aiohttp import web

from controller.protocol import (
    PROTOCOL_VERSION,
    WORKER_TOKEN_HEADER,
    AddVariantRequest,
    DeltaEvent,
    DetokenizeReply,
    DetokenizeRequest,
    DoneEvent,
    ErrorEvent,
    GenerateRequest,
    HeartbeatReply,
    HeartbeatRequest,
    Message,
    NamedVariantRequest,
    PromptEvent,
    RegisterRequest,
    ServedModel,
    TokenizeReply,
    TokenizeRequest,
    VariantsReply,
    WorkerStats,
)
from model_worker.variant_reports import VariantReports
from tests.fakes.fake_variants import FakeVariants, VariantRefused


@dataclass(frozen=True, slots=True)
class Script:
    """What a generate request gets.

    Attributes:
        deltas: the text of each DeltaEvent of each choice; one token each.
        refuse: answered with `refuse_status` instead of a stream.
        first_delay_s, delay_s: before the PromptEvent, and before each delta.
        fail_after: after this many deltas the stream ends with an ErrorEvent; 0: right after the PromptEvent.
        fail_first: the ErrorEvent comes before the PromptEvent.
        drop_after: after this many deltas the connection is reset; -1: before the PromptEvent.
        hang_after: after this many deltas nothing comes any more; -1: before the PromptEvent.
        raw: bytes to send instead of all events, each as one write.
    """

    deltas: Sequence[str] = ("Hello", " world")
    refuse: ErrorEvent | None = None
    refuse_status: int = 400
    first_delay_s: float = 0.0
    delay_s: float = 0.0
    fail_after: int | None = None
    fail_first: ErrorEvent | None = None
    drop_after: int | None = None
    hang_after: int | None = None
    raw: Sequence[bytes] | None = None


@dataclass(slots=True)
class FakeWorker:
    """Attributes:
    variants: told of in registrations and heartbeats, and changed by the controller.
    requests: the generate requests that arrived, in order.
    cancelled: the ids of those whose connection was closed before their end.
    """

    worker_id: str = "worker-1"
    script: Script = field(default_factory=Script)
    models: Sequence[ServedModel] = (ServedModel(name="m", family="llama", max_model_len=128, chat=True, dtype="fp32"),)
    token: str | None = None
    variants: FakeVariants = field(default_factory=FakeVariants)
    stats: WorkerStats = field(default_factory=lambda: WorkerStats(kv_blocks_total=16))
    scripts: list[Script] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    url: str = ""
    stats_delay_s: float = 0.0
    _runner: web.AppRunner | None = None
    _reports: VariantReports = field(default_factory=VariantReports)
    _connections: set[asyncio.Transport] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        app = web.Application(middlewares=[self._check_token], client_max_size=64 * 1024 * 1024)
        app.add_routes(
            [
                web.post("/internal/generate", self._generate),
                web.post("/internal/tokenize", self._tokenize),
                web.post("/internal/detokenize", self._detokenize),
                web.get("/internal/stats", self._stats),
                web.get("/internal/variants", self._list_variants),
                web.post("/internal/variants/{verb}", self._change_variant),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """Go away as a killed process does: every connection is reset, the port refuses new ones."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        for transport in list(self._connections):
            transport.abort()
        await runner.cleanup()

    def registration(self) -> RegisterRequest:
        return RegisterRequest(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self.worker_id,
            url=self.url,
            models=list(self.models),
            stats=self.stats,
            variants=self._reports.next(self.variants.statuses.values()),
        )

    async def register(self, controller_url: str) -> aiohttp.ClientResponse:
        self._reports.forget()
        return await self._call(f"{controller_url}/internal/workers/register", self.registration())

    async def heartbeat(self, controller_url: str) -> aiohttp.ClientResponse:
        url = f"{controller_url}/internal/workers/{self.worker_id}/heartbeat"
        report = self._reports.next(self.variants.statuses.values())
        response = await self._call(url, HeartbeatRequest(stats=self.stats, variants=report))
        if response.status == 200:
            self._reports.answered(HeartbeatReply.model_validate_json(await response.text()).report_number)
        return response

    async def leave(self, controller_url: str) -> aiohttp.ClientResponse:
        return await self._call(f"{controller_url}/internal/workers/{self.worker_id}/leave", None)

    async def _call(self, url: str, message: Message | None) -> aiohttp.ClientResponse:
        headers = {"content-type": "application/json"}
        if self.token is not None:
            headers[WORKER_TOKEN_HEADER] = self.token
        body = None if message is None else message.model_dump_json()
        async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
            await response.read()
            return response

    # ------------------------------------------------------------------------------------------------ routes

    @web.middleware
    async def _check_token(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self.token is not None and request.headers.get(WORKER_TOKEN_HEADER) != self.token:
            return _reply(ErrorEvent(code="invalid_api_key", message="wrong worker token"), status=401)
        assert request.transport is not None
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        self._connections.add(transport)
        try:
            return await handler(request)
        finally:
            self._connections.discard(transport)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        message = GenerateRequest.model_validate_json(await request.read())
        self.requests.append(message)
        script = self.script
        if self.scripts:
            script = self.scripts.pop(0)
        if script.refuse is not None:
            return _reply(script.refuse, status=script.refuse_status)
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        try:
            await response.prepare(request)
            await self._play(script, message, request, response)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.append(message.request_id)
            raise
        return response

    async def _play(
        self, script: Script, message: GenerateRequest, request: web.Request, response: web.StreamResponse
    ) -> None:
        async def send(event: Message) -> None:
            await response.write(event.model_dump_json().encode() + b"\n")

        if script.raw is not None:
            for piece in script.raw:
                await response.write(piece)
            return
        await asyncio.sleep(script.first_delay_s)
        if script.fail_first is not None:
            await send(script.fail_first)
            return
        await _interrupt(script, -1, request)
        await send(PromptEvent(num_prompt_tokens=3))
        await _interrupt(script, 0, request)
        for num_sent, text in enumerate(script.deltas, start=1):
            if script.fail_after is not None and num_sent > script.fail_after:
                break
            await asyncio.sleep(script.delay_s)
            last = num_sent == len(script.deltas)
            for index in range(message.sampling.n):
                await send(
                    DeltaEvent(index=index, text=text, num_tokens=1, finish_reason="stop" if last else None)
                )  # fmt: skip
            await _interrupt(script, num_sent, request)
        if script.fail_after is not None:
            await send(ErrorEvent(code="internal_error", message="the engine failed"))
            return
        num_tokens = len(script.deltas) * message.sampling.n
        await send(DoneEvent(num_prompt_tokens=3, num_cached_tokens=0, num_completion_tokens=num_tokens))

    async def _tokenize(self, request: web.Request) -> web.Response:
        message = TokenizeRequest.model_validate_json(await request.read())
        text = getattr(message.prompt, "text", "")
        ids = list(text.encode())
        strs = [chr(i) for i in ids] if message.return_token_strs else None
        return _reply(TokenizeReply(token_ids=ids, token_strs=strs, max_model_len=128))

    async def _detokenize(self, request: web.Request) -> web.Response:
        message = DetokenizeRequest.model_validate_json(await request.read())
        return _reply(DetokenizeReply(text=bytes(message.token_ids).decode()))

    async def _list_variants(self, request: web.Request) -> web.Response:
        return _reply(VariantsReply(variants=list(self.variants.statuses.values())))

    async def _change_variant(self, request: web.Request) -> web.Response:
        verb, body = request.match_info["verb"], await request.read()
        try:
            if verb == "add":
                return _reply(await self.variants.add(AddVariantRequest.model_validate_json(body)))
            return _reply(self.variants.tell(verb, NamedVariantRequest.model_validate_json(body).name))
        except VariantRefused as refused:
            return _reply(refused.event, status=refused.status)

    async def _stats(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.stats_delay_s)
        return _reply(self.stats)


async def _interrupt(script: Script, num_sent: int, request: web.Request) -> None:
    """Drop the connection or hang, where the script says so at this point."""
    if script.drop_after == num_sent:
        assert request.transport is not None
        request.transport.abort()
        raise ConnectionResetError("dropped by the script")
    if script.hang_after == num_sent:
        await asyncio.Event().wait()


def _reply(message: Message, *, status: int = 200) -> web.Response:
    return web.Response(text=message.model_dump_json(), status=status, content_type="application/json")
