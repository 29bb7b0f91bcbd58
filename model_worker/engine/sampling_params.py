"""How the tokens of one request are drawn and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from registry.errors import InvalidRequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 32
MAX_PRIORITY = 1000


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request; immutable.

    Order of application, as in vLLM: logprobs are taken from the model's own logits; then `min_tokens` mask,
    `logit_bias`, penalties, temperature, `min_p`, `top_k`, `top_p`.

    Attributes:
        n: sequences sampled from the one prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: smallest set of most probable tokens whose mass reaches top_p; 1 is off.
        top_k: only the k most probable tokens; 0 is off.
        min_p: only tokens with at least min_p times the probability of the most probable; 0 is off.
        repetition_penalty: > 0; logits of tokens seen in prompt or output are divided (positive) or multiplied
            (negative) by it; 1 is off. Source: CTRL, arXiv 1909.05858, section 4.1.
        presence_penalty: subtracted once from logits of tokens seen in the output.
        frequency_penalty: subtracted once for each time that a token was seen in the output.
        logit_bias: token id to a value in [-100, 100] added to its logit.
        seed: the same seed gives the same tokens whatever else is in the batch; None draws a fresh one.
        stop: strings that end the text; not part of it unless include_stop_str_in_output.
        stop_token_ids: further ids that end the sequence, beside the model's own end-of-sequence ids.
        min_tokens: no stop id is sampled, and no stop string looked for, before this many tokens.
        max_tokens: most tokens to generate; None: up to the model's context length.
        ignore_eos: the model's end-of-sequence ids do not end the sequence.
        logprobs: for each token, the logprobs of it and of this many most probable; None: none.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        priority: of the request; a lower number is served earlier, and preempted later. It is strict: while requests of
            a lower number leave no room, those of a higher one wait.

    Raises:
        InvalidRequestError: a value outside its range, naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    priority: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.n <= MAX_N, "n", f"must be between 1 and {MAX_N}", self.n)
        _require_finite("temperature", self.temperature)
        _require(0.0 <= self.temperature <= 100.0, "temperature", "must be between 0 and 100", self.temperature)
        _require_finite("top_p", self.top_p)
        _require(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1", self.top_p)
        _require(self.top_k >= 0, "top_k", "must be 0 (off) or positive", self.top_k)
        _require_finite("min_p", self.min_p)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1", self.min_p)
        _require_finite("repetition_penalty", self.repetition_penalty)
        _require(self.repetition_penalty > 0.0, "repetition_penalty", "must be positive", self.repetition_penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require_finite(name, value)
            _require(-2.0 <= value <= 2.0, name, "must be between -2 and 2", value)
        for token_id, bias in self.logit_bias.items():
            _require(token_id >= 0, "logit_bias", "keys must be token ids", token_id)
            _require_finite("logit_bias", bias)
            _require(-100.0 <= bias <= 100.0, "logit_bias", "values must be between -100 and 100", bias)
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit 64 bits", self.seed)
        _require(
            len(self.stop) <= MAX_STOP_STRINGS, "stop", f"holds at most {MAX_STOP_STRINGS} strings", len(self.stop)
        )
        _require(all(self.stop), "stop", "must not hold an empty string", "")
        _require(all(i >= 0 for i in self.stop_token_ids), "stop_token_ids", "must be token ids", self.stop_token_ids)
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1", self.max_tokens)
        _require(self.min_tokens >= 0, "min_tokens", "must not be negative", self.min_tokens)
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_tokens", "must not exceed max_tokens", self.min_tokens)
        _require(
            -MAX_PRIORITY <= self.priority <= MAX_PRIORITY,
            "priority",
            f"must be between -{MAX_PRIORITY} and {MAX_PRIORITY}",
            self.priority,
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"must be between 0 and {MAX_LOGPROBS}", value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def depends_on_output(self) -> bool:
        """What a token is drawn from depends on which tokens were drawn before, beside what the model makes of them."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _require(ok: bool, param: str, rule: str, value: object) -> None:
    if not ok:
        raise InvalidRequestError(f"{param} {rule}, got {value!r}.", param=param)


def _require_finite(param: str, value: float) -> None:
    _require(math.isfinite(value), param, "must be a finite number", value)
