"""POST /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from controller.openai.backend import Backend
from controller.openai.body import openapi_body, read_request
from controller.openai.json_bytes import json_response
from controller.openai.responses import error_responses
from controller.openai.schemas_tokenize import DetokenizeBody, DetokenizeResult, TokenizeBody, TokenizeResult
from controller.protocol import DetokenizeRequest, TokenizeRequest
from registry.errors import InvalidRequestError

TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"


def create_tokenize_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["Tokens"])

    @router.post(
        TOKENIZE_PATH,
        summary="Turn a text or a conversation into token ids",
        response_model=None,
        responses={200: {"model": TokenizeResult}, **error_responses()},
        openapi_extra=openapi_body(TokenizeBody),
    )
    async def tokenize(request: Request) -> Response:
        with backend.metrics.start_request(TOKENIZE_PATH) as observer:
            body = await read_request(request, TokenizeBody)
            model = _model_or_only_one(backend, body.model)
            reply = await backend.gateway.tokenize(
                TokenizeRequest(model=model, prompt=body.to_prompt(), return_token_strs=body.return_token_strs)
            )
            observer.set_model(model)
        result: TokenizeResult = {
            "count": len(reply.token_ids),
            "max_model_len": reply.max_model_len,
            "tokens": reply.token_ids,
            "token_strs": reply.token_strs,
        }
        return json_response(result)

    @router.post(
        DETOKENIZE_PATH,
        summary="Turn token ids into text",
        response_model=None,
        responses={200: {"model": DetokenizeResult}, **error_responses()},
        openapi_extra=openapi_body(DetokenizeBody),
    )
    async def detokenize(request: Request) -> Response:
        with backend.metrics.start_request(DETOKENIZE_PATH) as observer:
            body = await read_request(request, DetokenizeBody)
            model = _model_or_only_one(backend, body.model)
            reply = await backend.gateway.detokenize(DetokenizeRequest(model=model, token_ids=body.tokens))
            observer.set_model(model)
        result: DetokenizeResult = {"prompt": reply.text}
        return json_response(result)

    return router


def _model_or_only_one(backend: Backend, model: str | None) -> str:
    """Raises: InvalidRequestError, when no model is named and not exactly one is served."""
    if model is not None:
        return model
    names = [live.name for live in backend.gateway.models() if live.parent is None]
    if len(names) != 1:
        raise InvalidRequestError(
            f"model is required, as {len(names)} models are served; GET /v1/models lists them.", param="model"
        )
    return names[0]
