"""Computes steps: from a SchedulerOutput to one flat batch through the model, and its samples.

    SchedulerOutput ──BatchBuilder──► StepBatch ──StepRunner──► hidden, logits ──Sampler──► StepResult

Other ranks have a StepRunner too, and get the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adapters.load_plan import LoadPlan
from adapters.memory import available_memory_bytes
from model_worker.engine.batch_builder import BatchBuilder, prompt_targets
from model_worker.engine.config import EngineConfig
from model_worker.engine.executor import PendingStep
from model_worker.engine.extra_logits import sample_by_vocabulary
from model_worker.engine.kv_cache import (
    KVCache,
    bytes_per_block,
    choose_num_blocks,
    choose_num_host_blocks,
    free_memory_bytes,
)
from model_worker.engine.layer_groups import group_layers
from model_worker.engine.load_report import LoadReport
from model_worker.engine.loader import NativeRoute, load_model
from model_worker.engine.lora.bound_variant import BoundVariant
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.sampled_row import SampledRow
from model_worker.engine.sampler import Sampler
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.speculation.drafted_sequence import DraftedSequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput, StepResult
from model_worker.engine.step_batch import BlockMoves, StepBatch
from model_worker.engine.step_profiler import Profiler
from model_worker.engine.step_runner import BoundVariants, StepRunner
from model_worker.engine.visibility import Visibility
from registry.errors import UnsupportedModelError


class ModelRunner:
    """Owns the model and the KV cache; an `Executor`.

    Args:
        plan: what to load.
        config: cache, batch bounds, threads.
        device: where it runs.
        kernels: of this CPU, for the native decoder; None: there are none.
        profiler: records where the time of a step goes.
        group: the ranks that the model is divided among, each with a runner like this one; None: it is whole.

    Attributes:
        steps: computes the batches.
        num_blocks, block_size: of the KV cache.
        num_host_blocks: of the pool that sequences are swapped to.
        groups: what the layers of each layer group see.
        vocab_size: rows of the model's output head.
        max_num_batched_tokens: most tokens of one step.
        load_report: what loading did with each tensor.

    Raises:
        ClientError: the checkpoint or the memory does not allow it.
    """

    def __init__(
        self,
        plan: LoadPlan,
        config: EngineConfig,
        *,
        device: str = "cpu",
        kernels: KernelLibrary | None = None,
        profiler: Profiler | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self.profiler = profiler or Profiler()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.device = torch.device(device)
        self.max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        self.load_report = LoadReport()
        native = None
        if kernels is not None and self.device.type == "cpu" and group is None:
            team = Team(kernels, torch.get_num_threads())
            native = NativeRoute(team, max_rows=config.scheduler.max_num_batched_tokens)
        self.model = load_model(
            plan, self.device, self.load_report, model_impl=config.model_impl, native=native, group=group
        )
        self.profiler.watch(self.model)
        self.vocab_size = self.model.vocab_size
        # An id past the vocabulary ends nothing: the model cannot produce it.
        stop_token_ids = tuple(token_id for token_id in plan.stop_token_ids if token_id < self.vocab_size)
        self._sampler = Sampler(self.vocab_size, stop_token_ids)
        block_size = config.cache.block_size
        kv_dtype = self._choose_kv_dtype(config.cache.kv_cache_dtype)
        groups = group_layers(self.model.attentions, max_model_len=plan.max_model_len)
        block_bytes = bytes_per_block(self.model.attentions, groups, block_size, kv_dtype)
        num_sharing = 1 if group is None or self.device.type != "cpu" else group.size  # this machine's memory
        num_blocks = choose_num_blocks(
            config.cache,
            block_bytes,
            max_useful_blocks=config.scheduler.max_num_seqs
            * groups.max_blocks(
                plan.max_model_len + block_size,
                block_size=block_size,
                max_step_tokens=config.scheduler.max_num_batched_tokens,
            ),
            free_bytes=free_memory_bytes(self.device) // num_sharing,
            device=self.device,
        )
        num_blocks = num_blocks if group is None else group.minimum(num_blocks)
        num_host_blocks = choose_num_host_blocks(
            config.cache,
            block_bytes,
            free_bytes=available_memory_bytes() // num_sharing
            - (num_blocks * block_bytes if self.device.type == "cpu" else 0),
            device=self.device,
        )
        num_host_blocks = num_host_blocks if group is None else group.minimum(num_host_blocks)
        self._cache = KVCache(
            self.model.attentions,
            groups,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=kv_dtype,
            device=self.device,
            num_host_blocks=num_host_blocks,
        )
        self._builder = BatchBuilder(block_size, groups.num_groups)
        self.steps = StepRunner(self.model, self._cache, self.device)
        self._warm_up(
            min(
                config.scheduler.max_num_batched_tokens,
                plan.max_model_len,
                num_blocks // groups.num_groups * block_size,
            )
        )

    def _choose_kv_dtype(self, wanted: str) -> str:
        if wanted != "auto" and wanted not in self.model.kv_dtypes:
            raise UnsupportedModelError(
                f"--kv-cache-dtype {wanted} is not possible for this model on this machine; it can be "
                f"{', '.join(self.model.kv_dtypes)}."
            )
        return self.model.kv_dtypes[0] if wanted == "auto" else wanted

    @property
    def runs_ahead(self) -> bool:
        return False

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def num_host_blocks(self) -> int:
        return self._cache.num_host_blocks

    @property
    def groups(self) -> tuple[Visibility, ...]:
        return self._cache.groups.visibility

    @property
    def block_size(self) -> int:
        return self._cache.block_size

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Swap and copy blocks, write K and V of all scheduled tokens, and sample where asked. Blocks until done."""
        with self.profiler.span("prepare"):
            batch = self._builder.build(output)
        bound = _bound_variants(output.scheduled) if batch.segments else {}
        swap_s = self._move_blocks(batch.blocks)
        with self.profiler.span("forward", rows=batch.num_tokens):
            hidden = self.steps.forward(batch, bound)  # [T, hidden]
        prompt_logprobs = self._prompt_logprobs(output.scheduled, batch, hidden, bound)
        sampled = _sampled_rows(output.scheduled)
        if not sampled:
            return StepResult((), prompt_logprobs, swap_s)
        with self.profiler.span("logits", rows=len(sampled)):
            logits = self.steps.logits(batch, hidden, bound)
            extra = self.steps.extra_logits(batch, hidden, bound)
            if batch.repeats is not None:
                logits = logits[torch.from_numpy(batch.repeats).to(self.device)]
        with self.profiler.span("sample", rows=len(sampled)):
            if extra:
                rows = np.arange(len(sampled)) if batch.repeats is None else batch.repeats
                samples = sample_by_vocabulary(self._sampler, logits, extra, rows, sampled)
            else:
                samples = self._sampler.sample(logits, sampled)
        return StepResult(tuple(samples), prompt_logprobs, swap_s)

    def launch(self, output: SchedulerOutput) -> PendingStep:
        """As `execute`: it computes at once."""
        return _DoneStep(self.execute(output))

    def _move_blocks(self, moves: BlockMoves) -> float:
        """Returns the seconds that swapping took."""
        if not (moves.swap_out or moves.swap_in):
            self.steps.move_blocks(moves)
            return 0.0
        start_s = time.perf_counter()
        with self.profiler.span("swap", blocks=len(moves.swap_out) + len(moves.swap_in)):
            self.steps.move_blocks(moves)
        return time.perf_counter() - start_s

    def _prompt_logprobs(
        self, scheduled: SequenceOf[ScheduledSequence], batch: StepBatch, hidden: Tensor, bound: BoundVariants
    ) -> dict[int, list[TokenLogprobs]]:
        """By seq_id, for those who ask: logprobs of the prompt's tokens after each of the item's positions."""
        found: dict[int, list[TokenLogprobs]] = {}
        pieces = iter(batch.prompt_rows)
        for item in scheduled:
            num_top = item.sequence.sampling.prompt_logprobs
            if num_top is None:
                continue
            of_item = found.setdefault(item.sequence.seq_id, [])
            targets = prompt_targets(item)
            while len(of_item) < len(targets):
                rows = next(pieces)
                first = targets[len(of_item)]
                token_ids = item.sequence.token_ids[first : first + rows.end - rows.start]
                logits = self.steps.prompt_logits(rows, hidden, bound)
                of_item += self._sampler.prompt_logprobs(logits, token_ids, num_top)
        return found

    def _warm_up(self, num_tokens: int) -> None:
        """Compute the largest prompt chunk and one token after it, so that the first request finds everything ready.

        The blocks that are written belong to nobody yet.
        """
        sequence = Sequence(0, 0, [0] * num_tokens, SamplingParams(temperature=0.0), seed=0)
        num_blocks = -(-num_tokens // self.block_size)
        sequence.block_tables = [
            list(range(group * num_blocks, (group + 1) * num_blocks)) for group in range(len(self.groups))
        ]
        for start in sorted({0, num_tokens - 1}):
            self.execute(SchedulerOutput((ScheduledSequence(sequence, start, num_tokens - start, (sequence,)),)))


@dataclass(frozen=True, slots=True)
class _DoneStep:
    done: StepResult

    def result(self) -> StepResult:
        return self.done


def _sampled_rows(scheduled: SequenceOf[ScheduledSequence]) -> list[SampledRow]:
    """For whom is sampled, in the order of the step's samples."""
    rows: list[SampledRow] = []
    for item in scheduled:
        rows += item.sampled
        for num in range(1, len(item.drafts) + 1):
            rows.append(DraftedSequence(item.sequence, item.drafts[:num]))
    return rows


def _bound_variants(scheduled: SequenceOf[ScheduledSequence]) -> BoundVariants:
    bound: dict[int, BoundVariant] = {}
    for item in scheduled:
        variant = item.sequence.variant
        if variant is not None:
            assert variant.bound is not None, "a sequence runs whose variant is not active"
            bound[variant.number] = variant.bound
    return bound
