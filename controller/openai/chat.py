"""POST /v1/chat/completions."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response

from controller.auth import principal_of, who_asks
from controller.metrics import CLIENT_CLOSED
from controller.openai.backend import Backend
from controller.openai.body import openapi_body, read_request
from controller.openai.disconnect import run_while_connected
from controller.openai.generation import ChoiceText, Generation, Identity
from controller.openai.json_bytes import encode_json, encode_str, json_response
from controller.openai.logprobs import chat_logprobs, prompt_logprobs
from controller.openai.responses import client_gone, error_responses
from controller.openai.schemas_chat import ChatCompletionRequest
from controller.openai.schemas_responses import ChatChoice, ChatCompletion, Usage
from controller.openai.sse import ChunkFrame, EventStreamResponse

PATH = "/v1/chat/completions"


def create_chat_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        PATH,
        summary="Answer a conversation",
        response_model=None,
        responses={200: {"model": ChatCompletion}, **error_responses()},
        openapi_extra=openapi_body(ChatCompletionRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        with ExitStack() as held:
            observer = held.enter_context(backend.metrics.start_request(PATH))
            body = await read_request(request, ChatCompletionRequest)
            loras = body.lora_weights()
            backend.key_rules.check(principal_of(request.scope), body.model, loras, body.priority)
            generation = Generation(
                backend.gateway,
                observer,
                Identity.new("chatcmpl", body.model),
                [body.to_prompt()],
                body.sampling(),
                loras=loras,
                affinity_key=body.prompt_cache_key,
                sticky=who_asks(request.scope, body.user or body.safety_identifier),
            )
            if body.stream:
                encoder = ChatChunkEncoder(generation, body)
                return EventStreamResponse(generation, encoder, observer, held.pop_all())
            choices = await run_while_connected(request.receive, generation.collect())
            if choices is None:
                observer.finish(CLIENT_CLOSED)
                return client_gone()
            return json_response(_completion(generation, body, choices), request_id=generation.identity.id)

    return router


def _completion(generation: Generation, body: ChatCompletionRequest, choices: list[ChoiceText]) -> ChatCompletion:
    completion: ChatCompletion = {
        "id": generation.identity.id,
        "object": "chat.completion",
        "created": generation.identity.created,
        "model": generation.identity.model,
        "system_fingerprint": generation.fingerprint,
        "choices": [_choice(index, choice, body.logprobs) for index, choice in enumerate(choices)],
        "usage": generation.usage.to_json(),
    }
    if body.prompt_logprobs is not None:
        completion["prompt_logprobs"] = prompt_logprobs(generation.prompts[0], body.prompt_logprobs)
    return completion


def _choice(index: int, choice: ChoiceText, with_logprobs: bool) -> ChatChoice:
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
        "logprobs": chat_logprobs(choice.logprobs) if with_logprobs else None,
        "finish_reason": choice.finished,
        "stop_reason": choice.stop_reason,
    }


class ChatChunkEncoder:
    """Chunks as OpenAI writes them: the role first and alone, then text, then the finish reason alone."""

    def __init__(self, generation: Generation, body: ChatCompletionRequest) -> None:
        self._frame = ChunkFrame(generation, "chat.completion.chunk", include_usage=body.include_usage)
        self._with_logprobs = body.logprobs
        self._started: set[int] = set()

    def gain(self, choice: int, gain: ChoiceText) -> bytes:
        chunks: list[bytes] = []
        text = "".join(gain.texts)
        if choice not in self._started and (text or gain.logprobs or gain.finish_reason):
            self._started.add(choice)
            chunks.append(self._chunk(choice, b'{"role":"assistant","content":"","refusal":null}'))
        if text or gain.logprobs:
            logprobs = encode_json(chat_logprobs(gain.logprobs)) if self._with_logprobs else b"null"
            chunks.append(self._chunk(choice, b'{"content":%b}' % encode_str(text), logprobs))
        if gain.finish_reason is not None:
            finish = b'"%b","stop_reason":%b' % (gain.finish_reason.encode(), encode_json(gain.stop_reason))
            chunks.append(self._chunk(choice, b"{}", finish=finish))
        return b"".join(chunks)

    def end(self, usage: Usage) -> bytes:
        return self._frame.end(usage)

    def _chunk(self, choice: int, delta: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        return self._frame.chunk(
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (choice, delta, logprobs, finish)
        )
