"""The OpenAI-compatible API: request bodies in, completions and event streams out.

body ─► schemas* ─► generation ─► gateway ─► merged_events ─► chat, completions ─► sse or one JSON object
"""

from __future__ import annotations

from fastapi import APIRouter

from controller.openai.backend import Backend
from controller.openai.chat import create_chat_router
from controller.openai.completions import create_completions_router
from controller.openai.models import create_models_router
from controller.openai.tokenize import create_tokenize_router

__all__ = ["create_router"]


def create_router(state: Backend) -> APIRouter:
    """The routes below /v1, and /tokenize and /detokenize.

    They raise RootgraftErrors; the app that includes them turns those into responses, and checks keys and limits.

    Args:
        state: the controller's ControllerState, or any object with its gateway and metrics.
    """
    router = APIRouter()
    router.include_router(create_chat_router(state))
    router.include_router(create_completions_router(state))
    router.include_router(create_models_router(state))
    router.include_router(create_tokenize_router(state))
    return router
