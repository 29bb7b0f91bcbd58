"""The engine: requests in, one step at a time, news out. Synchronous and single-threaded."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence as SequenceOf
from dataclasses import replace

from adapters.load_plan import LoadPlan
from adapters.tokenizer import Tokenizer, load_tokenizer
from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import EngineConfig
from model_worker.engine.executor import Executor, ExecutorLostError
from model_worker.engine.lora.adapters_of_model import make_lora_manager
from model_worker.engine.lora.lora_manager import LoraManager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.machine import Machine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.open_requests import OpenRequests
from model_worker.engine.outputs import EngineStats, RequestOutput
from model_worker.engine.parallel.ranks import Ranks
from model_worker.engine.parallel.shared_variants import SharedVariants
from model_worker.engine.parallel.start import start_ranks
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.sequence import Sequence, SequenceGroup
from model_worker.engine.speculation.speculator import Speculator
from model_worker.engine.step_ahead import StepsAhead
from model_worker.engine.step_loop import StepLoop, SynchronousSteps
from model_worker.engine.step_profiler import Profiler
from registry.errors import ContextLengthError, InvalidRequestError, UnsupportedModelError
from registry.progress import Report

logger = logging.getLogger(__name__)

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the choices of one request get different random streams


class LLMEngine:
    """Continuous batching over an Executor.

    Args:
        config: scheduler and cache settings.
        executor: computes steps; owns the KV cache.
        tokenizer: of the model; turns sampled ids into text.
        stop_token_ids: the model's end-of-sequence ids.
        max_model_len: most tokens of prompt and output; lowered to what the KV cache can hold for one sequence.
        variant_digest: identity of the base's weights, part of the prefix cache's key.
        loras: LoRA adapters; None: there never are any.
        ranks: the other ranks, where the model is divided.
        clock: seconds, monotonic.
        profiler: records where the time of the steps goes.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        tokenizer: Tokenizer,
        *,
        stop_token_ids: tuple[int, ...],
        max_model_len: int,
        variant_digest: str = "",
        loras: LoraManager | None = None,
        ranks: Ranks | None = None,
        clock: Callable[[], float] = time.monotonic,
        profiler: Profiler | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.profiler = profiler or Profiler()
        self._block_manager = BlockManager(
            executor.num_blocks,
            executor.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            num_host_blocks=executor.num_host_blocks,
            groups=executor.groups,
            max_step_tokens=config.scheduler.max_num_batched_tokens,
        )
        self.max_model_len = self._block_manager.longest_sequence(max_model_len)
        if self.max_model_len < max_model_len:
            logger.warning(
                "The KV cache holds a request of %d tokens, fewer than the model's context of %d: longer ones are "
                "refused. Raise --kv-cache-gib to allow them.",
                self.max_model_len,
                max_model_len,
            )
        self._vocab_size = executor.vocab_size
        self._base_digest = variant_digest
        self._loras = loras
        self._ranks = ranks
        self._clock = clock
        speculator = None if config.speculation.speculation == "off" else Speculator(config.speculation)
        self._scheduler = Scheduler(
            config.scheduler, self._block_manager, clock=clock, speculator=speculator, gate=loras
        )
        self._requests = OpenRequests(self._scheduler, stop_token_ids=stop_token_ids, max_model_len=self.max_model_len)
        loop = StepsAhead if executor.runs_ahead else SynchronousSteps
        self._steps: StepLoop = loop(self._scheduler, executor, self._requests, clock=clock, profiler=self.profiler)
        self._next_seq_id = 0
        self._random = random.Random()
        self._prompt_tokens = 0

    @classmethod
    def from_plan(
        cls,
        plan: LoadPlan,
        config: EngineConfig,
        *,
        machine: Machine,
        variant_digest: str = "",
        profiler: Profiler | None = None,
        report: Report = logger.info,
    ) -> LLMEngine:
        """Load the model of a plan; blocks until it is ready.

        Args:
            machine: what it is computed with.
            report: called with a line for each thing that takes long.

        Raises:
            ClientError: the checkpoint, the memory or the configuration does not allow it.
        """
        tokenizer = load_tokenizer(plan.tokenizer_path)
        ranks = binder = None
        if config.tensor_parallel_size > 1:
            runner, ranks = start_ranks(plan, config, device=machine.device, profiler=profiler, report=report)
            binder = SharedVariants(runner.model, ranks)
        else:
            runner = ModelRunner(
                plan, config, device=str(machine.device), kernels=machine.kernels, profiler=profiler, report=report
            )
        loras = config.lora
        if runner.variants_bytes is not None:  # of the GPU; as much is kept of them in host memory
            loras = replace(loras, lora_memory_gib=2 * runner.variants_bytes / 2**30)
        return cls(
            config,
            runner,
            tokenizer,
            stop_token_ids=plan.stop_token_ids,
            max_model_len=plan.max_model_len,
            variant_digest=variant_digest,
            loras=make_lora_manager(loras, runner.model, base_digest=variant_digest, binder=binder),
            ranks=ranks,
            profiler=profiler,
        )

    # ------------------------------------------------------------------------------------------ requests

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        *,
        loras: SequenceOf[LoraWeight] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Accept a request; its news come from `step`.

        Args:
            loras: adapters that are added to the base, all at once.
            tokenizer: turns its sampled ids into text; None: the model's.

        Raises:
            ModelNotFoundError: there is no such adapter.
            InsufficientMemoryError: there is no room for the adapter beside those that are pinned.
            InvalidRequestError: the prompt or a sampling field cannot be served.
            ContextLengthError: prompt and output do not fit the context.
            RateLimitError: too many requests are waiting.
        """
        if request_id in self._requests.ids:
            raise InvalidRequestError(f"Request id {request_id!r} is in use.")
        variant = self.loras.resolve(loras) if loras else None
        vocab_size = self._vocab_size + (0 if variant is None else variant.num_extra_tokens)
        sampling = self._checked(prompt_token_ids, sampling, vocab_size)
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(63)
        sequences = [
            Sequence(
                self._next_seq_id + index,
                index,
                prompt_token_ids,
                sampling,
                seed=(seed + index * _SEED_STRIDE) % 2**64,
                base_digest=self._base_digest,
                variant=variant,
            )
            for index in range(sampling.n)
        ]
        group = SequenceGroup(request_id, sequences, sampling, arrival_s=self._clock())
        self._requests.add(group, tokenizer or self.tokenizer)
        if variant is not None:
            self.loras.count_request(variant)
        self._next_seq_id += sampling.n
        self._prompt_tokens += len(prompt_token_ids)

    def abort_request(self, request_id: str) -> bool:
        """Cancel a request and release what it holds; False when it has ended already. No output follows."""
        return self._requests.cancel(request_id)

    def cache_summary(self) -> str:
        """For people: what the KV cache holds."""
        manager = self._block_manager
        num_requests = manager.num_blocks / manager.num_blocks_for(self.max_model_len)
        summary = (
            f"{manager.num_blocks} KV blocks of {manager.block_size} tokens, enough for {num_requests:.1f} requests of "
            f"{self.max_model_len} tokens, the most of one"
        )
        if manager.num_host_blocks:
            summary += f"; {manager.num_host_blocks} blocks of host memory to swap to"
        if self._loras is not None:
            summary += f"; {self._loras.summary()}"
        return summary

    @property
    def has_unfinished_requests(self) -> bool:
        return self._scheduler.has_unfinished

    @property
    def stalled(self) -> bool:
        """All requests wait for LoRA adapters: a step does nothing until one is loaded."""
        return self._steps.stalled and self.has_unfinished_requests

    @property
    def loras(self) -> LoraManager:
        """The LoRA adapters.

        Raises:
            UnsupportedModelError: this engine has none.
        """
        if self._loras is None:
            raise UnsupportedModelError("This engine serves no LoRA adapters.")
        return self._loras

    # ------------------------------------------------------------------------------------------ steps

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what each request of it gained; of the step before, where they run ahead."""
        with self.profiler.step():
            failed = self.advance_loras()
            return failed + self._steps.step()

    def rest(self) -> None:
        """Call this when no requests are left, before others come: it lets go of what was held for them."""
        self._steps.rest()

    def advance_loras(self) -> list[RequestOutput]:
        """Go on with loading adapters, which `step` does too; returns the end of requests that waited in vain."""
        if self._loras is None:
            return []
        doomed = {s.group.request_id: error for s, error in self._loras.advance() if s.group is not None}
        return [self._requests.fail(request_id, error) for request_id, error in doomed.items()]

    def on_adapter_loaded(self, call: Callable[[], None]) -> None:
        """Have `call` called, on another thread, when `step` or `advance_loras` has something new to take."""
        if self._loras is not None:
            self._loras.loader.on_result = call

    def wait_for_adapters(self) -> None:
        """Until `step` or `advance_loras` has something new to take, if something is being loaded."""
        if self._loras is not None:
            self._loras.loader.wait()

    def on_lost(self, call: Callable[[ExecutorLostError], None]) -> None:
        """Have `call` called, on another thread, when no step can be computed any more."""
        if self._ranks is not None:
            ranks = self._ranks
            ranks.on_lost = lambda: call(ranks.lost())

    def close(self) -> None:
        """Load no adapters any more, and end the other ranks."""
        if self._loras is not None:
            self._loras.close()
        if self._ranks is not None:
            self._ranks.close()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks_used=self._block_manager.num_used_blocks,
            kv_blocks_total=self._block_manager.num_blocks,
            max_loras=0 if self._loras is None else self._loras.max_active,
            num_active_loras=0 if self._loras is None else self._loras.num_active,
            num_lora_combinations=0 if self._loras is None else self._loras.num_combinations,
            lora_combination_bytes=0 if self._loras is None else self._loras.combination_bytes,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._requests.num_generation_tokens,
            draft_tokens_total=scheduler.num_drafts,
            accepted_draft_tokens_total=scheduler.num_accepted_drafts,
            prefix_queried_tokens_total=scheduler.num_prefix_queried_tokens,
            prefix_hit_tokens_total=scheduler.num_prefix_hit_tokens,
            preemptions_total=scheduler.preemption.num_preemptions,
            preemptions_by_swap_total=scheduler.preemption.num_by_swap,
            swapped_out_blocks_total=scheduler.preemption.num_swapped_out_blocks,
            swapped_in_blocks_total=scheduler.preemption.num_swapped_in_blocks,
            kv_host_blocks_used=self._block_manager.num_used_host_blocks,
            kv_host_blocks_total=self._block_manager.num_host_blocks,
            finished_total=self._requests.num_finished,
            cancelled_total=self._requests.num_cancelled,
            failed_total=self._requests.num_failed,
        )

    def check_integrity(self) -> None:
        """Recount blocks, queues and requests.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        self._scheduler.check_integrity()
        assert self._requests.ids == self._scheduler.groups.keys()
        if not self._requests.ids:
            self.check_idle()

    def check_idle(self) -> None:
        """For an engine without requests: the part of `check_integrity` that takes no time, however large the cache.

        Raises:
            AssertionError: something leaked.
        """
        assert not self._requests.ids
        assert not self._scheduler.running
        assert not self._scheduler.waiting
        if self._loras is not None:
            self._loras.check_idle()
        assert self._block_manager.num_used_blocks == self._block_manager.num_used_host_blocks == 0

    # ------------------------------------------------------------------------------------------ internal

    def _checked(self, prompt_token_ids: list[int], sampling: SamplingParams, vocab_size: int) -> SamplingParams:
        num_prompt = len(prompt_token_ids)
        if num_prompt == 0:
            raise InvalidRequestError("The prompt is empty; it needs at least one token.", param="prompt")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < vocab_size:
            raise InvalidRequestError(f"The prompt has a token id outside 0..{vocab_size - 1}.", param="prompt")
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if any(token_id >= vocab_size for token_id in ids):
                raise InvalidRequestError(f"{name} has a token id outside 0..{vocab_size - 1}.", param=name)
        room = self.max_model_len - num_prompt
        wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
        if wanted > room:
            raise ContextLengthError(
                f"This model's context is {self.max_model_len} tokens; the request has {num_prompt} in the prompt and "
                f"asks for {wanted} more. Shorten the prompt or lower max_tokens.",
                param="max_tokens" if room >= 1 else "prompt",
            )
        if sampling.max_tokens is None:
            if sampling.min_tokens > room:
                raise ContextLengthError(
                    f"min_tokens is {sampling.min_tokens}, but the context has room for {room}.", param="min_tokens"
                )
            sampling = replace(sampling, max_tokens=room)
        return sampling
