"""The fields that we accept are those that the engine and the wire protocol take."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fastapi import FastAPI
from hypothesis import given, settings, strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from controller.openai import schemas
from controller.openai.schemas_chat import ChatCompletionRequest
from controller.openai.schemas_completions import CompletionRequest
from controller.protocol import Sampling
from model_worker.engine import sampling_params
from model_worker.engine.sampling_params import SamplingParams


def test_bounds_are_the_engines() -> None:
    for name in ("MAX_N", "MAX_LOGPROBS"):
        assert getattr(schemas, name) == getattr(sampling_params, name)
    assert schemas.MAX_STOP_STRINGS < sampling_params.MAX_STOP_STRINGS  # a chat template adds its own


def test_every_sampling_parameter_can_be_asked_for() -> None:
    engine = {field.name for field in dataclasses.fields(SamplingParams)}
    assert engine == set(Sampling.model_fields)
    assert engine <= set(ChatCompletionRequest.model_fields)
    assert engine <= set(CompletionRequest.model_fields)


def test_every_field_of_the_official_client_is_known() -> None:
    """A field that OpenAI adds must be decided upon: taken, or refused by name."""
    chat = set(chat_create_params.CompletionCreateParamsNonStreaming.__annotations__)
    chat |= set(chat_create_params.CompletionCreateParamsBase.__annotations__)
    assert chat <= set(ChatCompletionRequest.model_fields)
    completion = set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert completion <= set(CompletionRequest.model_fields)


sampling_fields = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 16),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 2**31 - 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 1e300, exclude_min=True),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 10**9 - 1).map(str), st.floats(-100, 100), max_size=3),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=16),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=3),
        "max_tokens": st.integers(1, 2**31 - 1),
        "prompt_logprobs": st.integers(0, 20),
        "logprobs": st.integers(0, 20),
        "priority": st.integers(-1000, 1000),
        "echo": st.booleans(),
    },
)


@given(sampling_fields)
@settings(deadline=None)
def test_the_engine_takes_all_that_we_let_through(fields: dict[str, Any]) -> None:
    sampling = CompletionRequest.model_validate({"model": "m", "prompt": "p", **fields}).sampling()
    values = {name: getattr(sampling, name) for name in Sampling.model_fields}
    values["stop"] = tuple(sampling.stop)
    SamplingParams(**values)
    assert Sampling.model_validate_json(sampling.model_dump_json()) == sampling


def test_openapi_describes_the_bodies(app: FastAPI) -> None:
    document = app.openapi()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert schema["additionalProperties"] is False
        assert "$ref" not in json.dumps(schema)
        assert "422" not in operation["responses"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert chat["required"] == ["model", "messages"]
    assert {"type": "null"} in chat["properties"]["temperature"]["anyOf"]
    assert "422" not in document["paths"]["/v1/models/{model_id}"]["get"]["responses"]
