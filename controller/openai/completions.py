"""POST /v1/completions."""

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
from controller.openai.logprobs import CompletionLogprobsWriter, joined, prompt_logprobs
from controller.openai.responses import client_gone, error_responses
from controller.openai.schemas_completions import CompletionRequest
from controller.openai.schemas_responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from controller.openai.sse import ChunkFrame, EventStreamResponse

PATH = "/v1/completions"


def create_completions_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post(
        PATH,
        summary="Continue one or several prompts",
        response_model=None,
        responses={200: {"model": Completion}, **error_responses()},
        openapi_extra=openapi_body(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        with ExitStack() as held:
            observer = held.enter_context(backend.metrics.start_request(PATH))
            body = await read_request(request, CompletionRequest)
            loras = body.lora_weights()
            backend.key_rules.check(principal_of(request.scope), body.model, loras, body.priority)
            generation = Generation(
                backend.gateway,
                observer,
                Identity.new("cmpl", body.model),
                body.to_prompts(),
                body.sampling(),
                loras=loras,
                return_prompt_text=body.echo,
                sticky=who_asks(request.scope, body.user),
            )
            if body.stream:
                encoder = CompletionChunkEncoder(generation, body)
                return EventStreamResponse(generation, encoder, observer, held.pop_all())
            choices = await run_while_connected(request.receive, generation.collect())
            if choices is None:
                observer.finish(CLIENT_CLOSED)
                return client_gone()
            return json_response(_completion(generation, body, choices), request_id=generation.identity.id)

    return router


def _completion(generation: Generation, body: CompletionRequest, choices: list[ChoiceText]) -> Completion:
    return {
        "id": generation.identity.id,
        "object": "text_completion",
        "created": generation.identity.created,
        "model": generation.identity.model,
        "system_fingerprint": generation.fingerprint,
        "choices": [_choice(generation, body, index, choice) for index, choice in enumerate(choices)],
        "usage": generation.usage.to_json(),
    }


def _choice(generation: Generation, body: CompletionRequest, index: int, choice: ChoiceText) -> CompletionChoice:
    text, logprobs = ChoiceWriter(generation, body, index).write(choice)
    result: CompletionChoice = {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": choice.finished,
        "stop_reason": choice.stop_reason,
    }
    if body.prompt_logprobs is not None:
        result["prompt_logprobs"] = prompt_logprobs(generation.prompt_of_choice(index), body.prompt_logprobs)
    return result


class ChoiceWriter:
    """Text and logprobs of one choice, whole or gain by gain; an echoed prompt goes before the first one."""

    def __init__(self, generation: Generation, body: CompletionRequest, index: int) -> None:
        self._generation = generation
        self._num_top = body.logprobs
        self._echo = body.echo
        self._index = index
        self._logprobs = CompletionLogprobsWriter()

    def write(self, gain: ChoiceText) -> tuple[str, CompletionLogprobs | None]:
        text = "".join(gain.texts)
        echoed = self._generation.prompt_of_choice(self._index) if self._echo else None
        self._echo = False
        if echoed is not None:
            text = (echoed.prompt_text or "") + text
        if self._num_top is None:
            return text, None
        if echoed is None:
            return text, self._logprobs.sampled(gain.logprobs, self._num_top)
        prompt = self._logprobs.prompt(echoed, self._num_top)
        return text, joined(prompt, self._logprobs.sampled(gain.logprobs, self._num_top))


class CompletionChunkEncoder:
    """One chunk for each gain; the last one of a choice has the finish reason."""

    def __init__(self, generation: Generation, body: CompletionRequest) -> None:
        self._frame = ChunkFrame(generation, "text_completion", include_usage=body.include_usage)
        self._choices = [ChoiceWriter(generation, body, index) for index in range(generation.num_choices)]

    def gain(self, choice: int, gain: ChoiceText) -> bytes:
        if gain.finish_reason is None and not gain.logprobs and not any(gain.texts):
            return b""
        text, logprobs = self._choices[choice].write(gain)
        finish = b"null"
        if gain.finish_reason is not None:
            finish = b'"%b","stop_reason":%b' % (gain.finish_reason.encode(), encode_json(gain.stop_reason))
        return self._frame.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (choice, encode_str(text), b"null" if logprobs is None else encode_json(logprobs), finish)
        )

    def end(self, usage: Usage) -> bytes:
        return self._frame.end(usage)
