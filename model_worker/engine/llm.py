"""Offline use: a model in this process, prompts in, answers out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import plan_load
from model_worker.engine.config import GPU_STEPS, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.machine import choose_device, find_machine
from model_worker.engine.outputs import FinishReason, RequestOutput, TokenLogprobs
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import InvalidRequestError
from registry.paths import default_cache_dir

Prompt = str | Sequence[int]


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs` has an entry for each of `token_ids`."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Generation:
    """The answer to one prompt."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class LLM:
    """A model loaded into this process.

        LLM("path/to/model").generate(["Once upon a time"], SamplingParams(max_tokens=20))

    Args:
        model: checkpoint directory or GGUF file.
        config: engine settings; None: those that the worker has without flags.
        dtype, quantization, chat_template, max_model_len: as the worker's flags of the same names.
        cache_dir: where built kernels are kept; None: where the worker keeps them.

    Raises:
        ClientError: the model cannot be loaded; the message says why.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        dtype: str = "auto",
        quantization: str = "auto",
        chat_template: str | None = None,
        max_model_len: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        if config is None:
            on_gpu = choose_device("auto").type == "cuda"
            config = EngineConfig(scheduler=SchedulerConfig(**GPU_STEPS) if on_gpu else SchedulerConfig())
        cache_dir = default_cache_dir(os.environ) if cache_dir is None else cache_dir
        machine = find_machine(config, cache_dir, quantization=quantization)
        self.plan = plan_load(
            Path(model),
            dtype=dtype,
            quantization=quantization,
            chat_template=chat_template,
            max_model_len=max_model_len,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            memory_bytes=machine.memory_bytes,
            native_bf16=machine.native_bf16,
            native_model_types=machine.native_model_types,
        )
        self.engine = LLMEngine.from_plan(self.plan, config, machine=machine)
        self._num_requests = 0

    def add_lora(self, name: str, path: str | Path) -> None:
        """Read a LoRA adapter in PEFT's format; `loras` of the other methods name it.

        Raises:
            ClientError: it is wrong, or not for this model; the message says why.
        """
        reply = self.engine.loras.add(name, Path(path))
        while not reply.done():
            self.engine.advance_loras()
            self.engine.wait_for_adapters()
        reply.result()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        loras: Sequence[LoraWeight] = (),
    ) -> list[Generation]:
        """Answer prompts (texts or token ids) in one batch; results come in the order of the prompts.

        Args:
            loras: adapters that are added to the base for all prompts.

        Raises:
            ClientError: a prompt cannot be served; nothing of the call is left running.
        """
        batch = _as_batch(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise InvalidRequestError(f"There are {len(batch)} prompts but {len(params)} sampling parameters.")
        encoded = [self.engine.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in batch]
        return self._run(encoded, params, loras)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        loras: Sequence[LoraWeight] = (),
        **template_kwargs: Any,
    ) -> Generation:
        """Answer one conversation, rendered with the model's chat template.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the conversation.
        """
        if self.plan.chat_template is None:
            raise InvalidRequestError("This model has no chat template; pass chat_template=NAME or use generate().")
        text = self.plan.chat_template.render(messages, **template_kwargs)
        prompt = self.engine.tokenizer.encode(text, add_special_tokens=False)
        return self._run([prompt], [params or SamplingParams()], loras)[0]

    def _run(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], loras: Sequence[LoraWeight]
    ) -> list[Generation]:
        results: dict[str, Generation] = {}
        try:
            for prompt, sampling in zip(prompts, params, strict=True):
                request_id = f"offline-{self._num_requests}"
                self._num_requests += 1
                self.engine.add_request(request_id, prompt, sampling, loras=loras)
                logprobs = sampling.logprobs is not None
                outputs = [CompletionOutput(i, "", [], [] if logprobs else None) for i in range(sampling.n)]
                results[request_id] = Generation(list(prompt), outputs)
            while self.engine.has_unfinished_requests:
                for news in self.engine.step():
                    _add_news(results[news.request_id], news)
                if self.engine.stalled:
                    self.engine.wait_for_adapters()
        finally:
            for request_id in results:
                self.engine.abort_request(request_id)
        return list(results.values())


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[int(token_id) for token_id in prompts]]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _add_news(result: Generation, news: RequestOutput) -> None:
    if news.error is not None:
        raise news.error
    result.num_cached_tokens = news.num_cached_tokens
    if news.prompt_logprobs is not None:
        result.prompt_logprobs = news.prompt_logprobs
    for delta in news.deltas:
        choice = result.outputs[delta.index]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        if choice.logprobs is not None and delta.logprobs is not None:
            choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
