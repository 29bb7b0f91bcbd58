"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from controller.openai.backend import Backend, LiveModel
from controller.openai.json_bytes import json_response
from controller.openai.responses import error_responses
from controller.openai.schemas_responses import ModelList, ModelObject
from registry.errors import ModelNotFoundError

PATH = "/v1/models"


def create_models_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.head(PATH, include_in_schema=False, response_model=None)
    @router.get(
        PATH,
        summary="List the models that are served now",
        response_model=None,
        responses={200: {"model": ModelList}},
    )
    async def list_models() -> Response:
        listed: ModelList = {"object": "list", "data": [_model(model) for model in backend.gateway.models()]}
        return json_response(listed)

    @router.head(PATH + "/{model_id:path}", include_in_schema=False, response_model=None)
    @router.get(
        PATH + "/{model_id:path}",
        summary="Describe a model that is served now",
        response_model=None,
        responses={200: {"model": ModelObject}, "default": error_responses()[404]},  # FastAPI would add a 422
    )
    async def retrieve_model(model_id: str) -> Response:
        model = backend.gateway.model(model_id)
        if model is None:
            raise ModelNotFoundError(
                f"No model {model_id[:80]!a} is served; GET /v1/models lists those that are.", param="model"
            )
        return json_response(_model(model))

    return router


def _model(model: LiveModel) -> ModelObject:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "rootgraft",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.max_model_len,
    }
