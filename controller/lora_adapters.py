"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's fields and answers; for admin keys."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import PlainTextResponse

from controller.auth import actor_of
from controller.openai.body import RequestModel, openapi_body, read_request
from controller.openai.responses import error_responses
from controller.openai.schemas import ModelName
from controller.state import ControllerState

LOAD_PATH = "/v1/load_lora_adapter"
UNLOAD_PATH = "/v1/unload_lora_adapter"


class LoadLoraAdapter(RequestModel):
    lora_name: ModelName
    lora_path: str = Field(min_length=1, max_length=4096, description="Below the workers' adapter root.")
    load_inplace: bool = Field(default=False, description="An adapter of that name may be there; it is replaced.")
    base_model_name: ModelName | None = Field(default=None, description="Needed where several base models are served.")
    is_3d_lora_weight: Literal[False] | None = None  # ours to find out from the files


class UnloadLoraAdapter(RequestModel):
    lora_name: ModelName
    lora_int_id: int | None = Field(default=None, description="Without effect: the name says it all.")


def create_router(state: ControllerState) -> APIRouter:
    router = APIRouter(tags=["LoRA adapters"])

    @router.post(
        LOAD_PATH,
        summary="Load a LoRA adapter on all workers of its base model, now and whenever they start again",
        response_model=None,
        responses=error_responses(),
        openapi_extra=openapi_body(LoadLoraAdapter),
    )
    async def load(request: Request) -> PlainTextResponse:
        body = await read_request(request, LoadLoraAdapter)
        await state.variants.add(
            body.lora_name,
            parent=body.base_model_name,
            path=body.lora_path,
            pinned=False,
            replace=body.load_inplace,
            actor=actor_of(request.scope),
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        UNLOAD_PATH,
        summary="Remove a LoRA adapter from all workers; requests that use it end first",
        response_model=None,
        responses=error_responses(),
        openapi_extra=openapi_body(UnloadLoraAdapter),
    )
    async def unload(request: Request) -> PlainTextResponse:
        body = await read_request(request, UnloadLoraAdapter)
        await state.variants.remove(body.lora_name, actor=actor_of(request.scope))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
