"""What a worker does with a request: prompt → engine → events. No HTTP here."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from adapters.load_plan import LoadPlan
from adapters.tokenizer import Tokenizer
from controller.protocol import (
    DetokenizeReply,
    DetokenizeRequest,
    GenerateRequest,
    Sampling,
    ServedModel,
    TokenizeReply,
    TokenizeRequest,
    WorkerStats,
)
from model_worker.adapter_root import AdapterRoot
from model_worker.delta_probe import DeltaProbe
from model_worker.drain import Drain
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.outputs import EngineStats, RequestOutput
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine_loras import EngineLoras
from model_worker.events import Event, EventBuilder, TokenNames
from model_worker.prompt import EncodedPrompt, PromptEncoder
from model_worker.published_variants import PublishedVariants
from model_worker.signature_check import SignatureCheck
from model_worker.variants import Variants
from registry.errors import InternalError, InvalidRequestError, ModelNotFoundError


class Engine(Protocol):
    """What the worker needs of an engine; `AsyncLLMEngine` is the one.

    `generate` raises ClientError or ServerError before its first output when it does not take the request; later
    failures come as the `error` of the last output. Closing the generator aborts the request.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def loras(self) -> EngineLoras: ...
    @property
    def failed(self) -> BaseException | None: ...
    @property
    def num_steps(self) -> int: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def generate(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        loras: Sequence[LoraWeight] = (),
        tokenizer: Tokenizer | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...
    def stats(self) -> EngineStats: ...


class WorkerService:
    """One served model: checks requests, feeds the engine, and speaks of its state."""

    def __init__(
        self,
        engine: Engine,
        plan: LoadPlan,
        model_name: str,
        *,
        digest: str | None = None,
        adapter_root: Path | None = None,
        published: PublishedVariants | None = None,
        adapter_templates: bool = True,
        check_signature: SignatureCheck | None = None,
    ) -> None:
        """Args: as in WorkerConfig and Variants; `adapter_templates`: adapters' own chat templates are used."""
        self.drain = Drain()
        self.variants = Variants(
            engine.loras,
            plan,
            engine.tokenizer,
            parent=model_name,
            root=AdapterRoot(adapter_root),
            published=published,
            with_templates=adapter_templates,
            check_signature=check_signature,
            probe=DeltaProbe(
                engine.generate, max_model_len=engine.max_model_len, weights=plan.quantization or plan.dtype
            ),
        )
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._names = TokenNames(engine.tokenizer)
        self._encoder = PromptEncoder()
        self._chat_template = plan.chat_template
        self._numbers = itertools.count()
        self.model = ServedModel(
            name=model_name,
            family=plan.family.name,
            max_model_len=engine.max_model_len,
            chat=plan.chat_template is not None,
            dtype=plan.dtype,
            digest=digest,
        )

    @property
    def failed(self) -> BaseException | None:
        """Why the engine died, if it did."""
        return self._engine.failed

    @property
    def num_steps(self) -> int:
        """Steps that the engine has computed so far."""
        return self._engine.num_steps

    def close(self) -> None:
        self._encoder.close()

    def stats(self) -> WorkerStats:
        return WorkerStats(draining=self.drain.draining, **asdict(self._engine.stats()))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event], None]:
        """Events of one request, those of one engine step together. Closing the iterator aborts the request.

        One adapter with scale 1 is that adapter; others are added up, exactly.

        Raises:
            RootgraftError: the request was refused (before the first events), or the engine died.
        """
        self._check_model(request.model)
        prompts = self.variants.prompt_format(lora.name for lora in request.loras)
        tokenizer = prompts.tokenizer or self._tokenizer
        prompt = await self._encoder.encode(request.prompt, tokenizer, prompts.chat_template or self._chat_template)
        sampling = self._sampling(request.sampling, prompt, prompts.stop_token_ids)
        loras = tuple(LoraWeight(lora.name, lora.scale) for lora in request.loras)
        names = self._names if prompts.tokenizer is None else TokenNames(prompts.tokenizer)
        builder = EventBuilder(names, prompt.token_ids, prompt_text=_prompt_text(request, prompt, tokenizer))
        # The controller may send a request again while the engine still winds up its first attempt.
        engine_id = f"{request.request_id}#{next(self._numbers)}"
        try:
            outputs = self._engine.generate(
                engine_id, prompt.token_ids, sampling, loras=loras, tokenizer=prompts.tokenizer
            )
            async with aclosing(outputs):
                async for output in outputs:
                    events = builder.build(output)
                    if events:
                        yield events
                    if output.finished:
                        return
        except InvalidRequestError as error:
            if error.param == "prompt":
                error.param = prompt.param  # the engine does not know that it was a conversation
            raise
        raise InternalError("The engine broke off; send the request again.")

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        self._check_model(request.model)
        prompts = self.variants.prompt_format(lora.name for lora in request.loras)
        tokenizer, template = prompts.tokenizer or self._tokenizer, prompts.chat_template or self._chat_template
        token_ids = (await self._encoder.encode(request.prompt, tokenizer, template)).token_ids
        return TokenizeReply(
            token_ids=token_ids,
            token_strs=await self._encoder.token_strs(token_ids, tokenizer) if request.return_token_strs else None,
            max_model_len=self._engine.max_model_len,
        )

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeReply:
        self._check_model(request.model)
        tokenizer = self.variants.prompt_format(lora.name for lora in request.loras).tokenizer or self._tokenizer
        return DetokenizeReply(text=await self._encoder.decode(request.token_ids, tokenizer))

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            raise ModelNotFoundError(
                f"This worker serves {self.model.name}, not {name}; GET /v1/models lists what is served.", param="model"
            )

    def _sampling(self, sampling: Sampling, prompt: EncodedPrompt, ends: tuple[int, ...]) -> SamplingParams:
        """`ends`: ids that end the replies of the request's adapters, as the base's own do."""
        values: dict[str, Any] = {name: getattr(sampling, name) for name in Sampling.model_fields}
        values["stop"] = tuple(dict.fromkeys((*sampling.stop, *prompt.stop)))
        values["stop_token_ids"] = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else ends))
        return SamplingParams(**values)


def _prompt_text(request: GenerateRequest, prompt: EncodedPrompt, tokenizer: Tokenizer) -> str | None:
    if not request.return_prompt_text:
        return None
    if prompt.text is not None:
        return prompt.text
    return tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
