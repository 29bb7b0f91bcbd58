"""The request fields that chat and text completions share.

Bounds are those of model_worker.engine.sampling_params (a test compares them); they are checked here too so that a
wrong value costs no worker and so that the OpenAPI page shows them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from controller.openai.body import RequestModel
from controller.protocol import LoraWeight, Sampling
from registry.errors import InvalidRequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_PRIORITY = 1000
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 1024
MAX_LORAS = 8
MAX_LORA_SCALE = 100.0  # magnitude; far above what gives text, far below what overflows
MAX_INT = 2**31 - 1

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]


def _check_token_id_key(value: str) -> str:
    if re.fullmatch(r"0|[1-9][0-9]{0,8}", value) is None:
        raise PydanticCustomError(
            "not_supported", 'the keys of logit_bias are token ids, as "42", not {key}.', {"key": repr(value[:60])}
        )
    return value


TokenIdKey = Annotated[str, AfterValidator(_check_token_id_key)]  # JSON has no integer keys
Hint = Annotated[str, StringConstraints(max_length=512)]  # accepted and without effect

# A field that the OpenAI API defines and that we do not implement: anything but null is refused.
Unsupported = Annotated[None, Field(default=None, description="Not supported; only null is accepted.")]


def _list_of_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, StringConstraints(min_length=1)]],
    Field(max_length=MAX_STOP_STRINGS),
    BeforeValidator(_list_of_stops, json_schema_input_type=str | list[str]),
]


class LoraParam(RequestModel):
    name: ModelName
    scale: float = Field(default=1.0, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)


class StreamOptions(RequestModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(RequestModel):
    """Fields of both kinds of completion, with the defaults of OpenAI and vLLM."""

    model: ModelName
    n: int = Field(default=1, ge=1, le=MAX_N)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, le=MAX_INT, description="0 and -1 are off.")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    logit_bias: dict[TokenIdKey, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_LOGIT_BIASES
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: bool = False
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT)
    ignore_eos: bool = False
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool = True
    priority: int = Field(
        default=0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="Requests with a lower number are served earlier by the model worker; strictly so. Below 0 (the "
        "operator's --min-priority) for admin keys only.",
    )
    loras: list[LoraParam] = Field(
        default_factory=list,
        max_length=MAX_LORAS,
        description="LoRA adapters of `model`, which is a base model then; their updates, times their scales, add up.",
    )
    stream: bool = False
    stream_options: StreamOptions | None = None

    user: Hint | None = Field(default=None, description="The same user gets the same version of a release.")
    metadata: dict[Hint, Hint] | None = Field(default=None, max_length=16)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    def lora_weights(self) -> list[LoraWeight]:
        return [LoraWeight(name=lora.name, scale=lora.scale) for lora in self.loras]

    def check_stream_fields(self) -> None:
        """Raises: InvalidRequestError, for fields that contradict `stream`."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError(
                "prompt_logprobs are not available in a stream; leave out stream or prompt_logprobs.",
                param="prompt_logprobs",
            )

    def to_sampling(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None) -> Sampling:
        """The wire form; the arguments are those that the two endpoints derive in different ways.

        Raises: InvalidRequestError, when `min_tokens` exceeds `max_tokens`.
        """
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens must not exceed max_tokens ({max_tokens}), got {self.min_tokens}.", param="min_tokens"
            )
        return Sampling(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token_id): bias for token_id, bias in self.logit_bias.items()},
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=self.skip_special_tokens,
            priority=self.priority,
        )


# ---------------------------------------------------------------------------------------------- chat template arguments

# Arguments of the renderer itself, which have fields of their own or none.
_RESERVED_TEMPLATE_NAMES = frozenset({"self", "messages", "add_generation_prompt", "continue_final_message"})


def _check_template_kwargs(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name in value:
        if name in _RESERVED_TEMPLATE_NAMES:
            raise PydanticCustomError(
                "not_supported",
                "chat_template_kwargs must not hold {name}; it is a field of the request or reserved.",
                {"name": name},
            )
    _check_finite(value)
    return value


def _check_finite(value: Any) -> None:
    """A number such as 1e999 is valid JSON, and infinite as a float. Depth is bounded by the JSON parser."""
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("not_supported", "chat_template_kwargs must hold finite numbers only.")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(item)


ChatTemplateKwargs = Annotated[
    dict[str, Any],
    Field(max_length=64),
    BeforeValidator(_check_template_kwargs, json_schema_input_type=dict[str, Any]),
]
