"""Computes steps: from a SchedulerOutput to one flat batch through the model, and its samples.

    SchedulerOutput ──BatchBuilder──► StepBatch ──StepRunner──► hidden, logits ──Sampler──► StepResult

Other ranks have a StepRunner too, and get the same batches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from adapters.load_plan import LoadPlan
from adapters.memory import DTYPE_BYTES, available_memory_bytes, gib
from model_worker.engine.accelerator import Accelerator, CudaAccelerator
from model_worker.engine.batch_builder import BatchBuilder, prompt_targets
from model_worker.engine.cache_layout import CacheLayout
from model_worker.engine.config import EngineConfig
from model_worker.engine.decode_graphs import DecodeGraphs, GraphedModel, bucket_sizes
from model_worker.engine.executor import PendingStep
from model_worker.engine.extra_logits import sample_by_vocabulary
from model_worker.engine.gpu_sizing import GpuSizing
from model_worker.engine.kv_cache import KVCache, choose_num_blocks, choose_num_host_blocks
from model_worker.engine.launched_step import LaunchedStep, WatchedStep, end_of_launched, watched
from model_worker.engine.load_report import LoadReport
from model_worker.engine.loader import NativeRoute, load_model
from model_worker.engine.lora.bound_variant import BoundVariant, VariantHost
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from model_worker.engine.ops.low_rank import to_device
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.parallel.group import OneRank, RankGroup
from model_worker.engine.pending_samples import PendingSamples
from model_worker.engine.sampled_row import SampledRow
from model_worker.engine.sampler import Sampler
from model_worker.engine.speculation.drafted_sequence import DraftedSequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput, StepResult
from model_worker.engine.step_batch import BlockMoves, StepBatch
from model_worker.engine.step_inputs import BatchShape, DeviceInputs
from model_worker.engine.step_profiler import Profiler
from model_worker.engine.step_runner import BoundVariants, StepRunner
from model_worker.engine.variant_activations import variant_activation_bytes
from model_worker.engine.visibility import Visibility
from model_worker.engine.warm_up_steps import every_kind_of_step, largest_step
from registry.progress import CountProgress, Report

logger = logging.getLogger(__name__)

_WARM_UP_ROWS = 64  # with logits, at most


class ModelRunner:
    """Owns the model and the KV cache; an `Executor`.

    Args:
        plan: what to load.
        config: cache, batch bounds, threads.
        device: where it runs.
        kernels: of this CPU, for the native decoder; None: there are none.
        profiler: records where the time of a step goes.
        group: the ranks that the model is divided among, each with a runner like this one; None: it is whole.
        accelerator: of the device; None: CUDA's, or none for a CPU.
        report: called with a line for each thing that takes long.

    Attributes:
        steps: computes the batches.
        num_blocks, block_size: of the KV cache.
        num_host_blocks: of the pool that sequences are swapped to.
        groups: what the layers of each layer group see.
        vocab_size: rows of the model's output head.
        max_num_batched_tokens: most tokens of one step.
        load_report: what loading did with each tensor.
        variants_bytes: what variants may take of a GPU; None: the model is computed in host memory.

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
        accelerator: Accelerator | None = None,
        report: Report = logger.info,
    ) -> None:
        self.profiler = profiler or Profiler()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.device = torch.device(device)
        if accelerator is None and self.device.type == "cuda":
            accelerator = CudaAccelerator(self.device)
        self._accelerator = accelerator
        self._group = OneRank() if group is None else group
        self._max_model_len = plan.max_model_len
        self._dtype_bytes = DTYPE_BYTES[plan.dtype]
        self._config = config
        self.max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        self.load_report = LoadReport()
        self._sizing = None if accelerator is None else GpuSizing(accelerator.memory, config, plan)
        with self._active(), nullcontext() if self._sizing is None else self._sizing.loading():
            self.model = self._load(plan, kernels, group)
        self.profiler.watch(self.model)
        self.vocab_size = self.model.vocab_size
        # An id past the vocabulary ends nothing: the model cannot produce it.
        stop_token_ids = tuple(token_id for token_id in plan.stop_token_ids if token_id < self.vocab_size)
        self._sampler = Sampler(self.vocab_size, stop_token_ids)
        self._layout = CacheLayout.of(self.model, config, max_model_len=plan.max_model_len)
        self._graphs: DecodeGraphs | None = None
        with self._active():
            if self._sizing is None:
                self._set_up(self._blocks_in_host_memory(), num_host_blocks=None)
            else:
                self._set_up_on_gpu(self._sizing, report)

    def _load(self, plan: LoadPlan, kernels: KernelLibrary | None, group: RankGroup | None) -> CausalModel:
        native = None
        if kernels is not None and self.device.type == "cpu" and group is None:
            native = NativeRoute(Team(kernels, torch.get_num_threads()), max_rows=self.max_num_batched_tokens)
        model_impl = self._config.model_impl
        return load_model(plan, self.device, self.load_report, model_impl=model_impl, native=native, group=group)

    def _active(self) -> AbstractContextManager[object]:
        return nullcontext() if self._accelerator is None else self._accelerator.active()

    @property
    def _num_sharing(self) -> int:
        """Ranks that share this machine's memory."""
        return self._group.size if self.device.type == "cpu" else 1

    def _blocks_in_host_memory(self) -> int:
        return choose_num_blocks(
            self._config.cache,
            self._layout.block_bytes,
            max_useful_blocks=self._layout.max_useful_blocks,
            free_bytes=available_memory_bytes() // self._num_sharing,
            device=self.device,
        )

    def _set_up_on_gpu(self, sizing: GpuSizing, report: Report) -> None:
        """Measure with a cache that is just large enough for the largest step, then make one of what is left."""
        scheduler = self._config.scheduler
        step, num_blocks = largest_step(
            num_tokens=scheduler.max_num_batched_tokens,
            num_sequences=scheduler.max_num_seqs,
            max_model_len=self._max_model_len,
            block_size=self.block_size,
            num_groups=self._layout.groups.num_groups,
        )
        report("Measuring the largest step")
        with sizing.measuring():
            self._set_up(num_blocks, num_host_blocks=0)
            use = sizing.measure(
                variant_activations=self._variant_activations(),
                compute_largest_step=lambda: self._compute(step),
                capture=None if self._graphs is None else lambda num: self._capture(most=num),
                forget=self._forget_cache,
                num_buckets=len(bucket_sizes(scheduler.max_num_seqs)),
            )
        num_blocks = sizing.choose_num_blocks(use, self._layout)
        with sizing.measuring():
            self._set_up(num_blocks, num_host_blocks=None)
            self._capture(CountProgress("Graphs of decode steps captured", report))
        cache_bytes = self.num_blocks * self._layout.block_bytes
        report(f"Memory of the GPU: {use.describe()}, {gib(cache_bytes)} for the KV cache")

    def _variant_activations(self) -> int:
        if not isinstance(self.model, VariantHost):
            return 0
        return variant_activation_bytes(
            (tensor.shape for _, tensor in self.model.weights()),
            num_tokens=self.max_num_batched_tokens,
            num_samples=2 * self._config.scheduler.max_num_seqs,
            vocab_size=self.vocab_size,
            dtype_bytes=self._dtype_bytes,
        )

    def _set_up(self, num_blocks: int, *, num_host_blocks: int | None) -> None:
        """Make the cache and what computes with it, and compute with it once.

        Args:
            num_host_blocks: None: as many as the configuration says.
        """
        layout = self._layout
        num_blocks = self._group.minimum(num_blocks)
        if num_host_blocks is None:
            own_bytes = num_blocks * layout.block_bytes if self.device.type == "cpu" else 0
            num_host_blocks = choose_num_host_blocks(
                self._config.cache,
                layout.block_bytes,
                free_bytes=available_memory_bytes() // self._num_sharing - own_bytes,
                device=self.device,
            )
        self._cache = KVCache(
            self.model.attentions,
            layout.groups,
            num_blocks=num_blocks,
            block_size=layout.block_size,
            dtype=layout.dtype,
            device=self.device,
            num_host_blocks=self._group.minimum(num_host_blocks),
        )
        self._builder = BatchBuilder(layout.block_size, layout.groups.num_groups)
        self.steps = self._make_steps()
        num_tokens = min(
            self.max_num_batched_tokens, self._max_model_len, num_blocks // layout.groups.num_groups * layout.block_size
        )
        for output in every_kind_of_step(num_tokens, block_size=layout.block_size, num_groups=layout.groups.num_groups):
            self._compute(output)

    @torch.inference_mode()
    def _compute(self, output: SchedulerOutput) -> None:
        self._launch(output).result()

    def _make_steps(self) -> StepRunner:
        if self._accelerator is None:
            return StepRunner(self.model, self._cache, self.device)
        scheduler = self._config.scheduler
        num_groups = self._layout.groups.num_groups
        max_rows = max(_WARM_UP_ROWS, 2 * scheduler.max_num_seqs)  # a draft for each sequence
        largest = BatchShape(
            num_groups, self.max_num_batched_tokens, scheduler.max_num_seqs, self._layout.max_blocks, max_rows
        )
        inputs = DeviceInputs(self.device, largest.num_bytes)
        drawn = torch.zeros(max_rows, dtype=torch.int64, device=self.device)
        if isinstance(self.model, GraphedModel):
            is_eager = self._config.enforce_eager
            graphs = DecodeGraphs(
                self.model,
                inputs,
                drawn,
                max_num_seqs=scheduler.max_num_seqs,
                num_groups=num_groups,
                max_blocks=self._layout.max_blocks,
                capture=_computed_once if is_eager else self._accelerator.capture(self.model.context),
            )
            if is_eager:  # kernels for variants are compiled by what would be captured
                with torch.inference_mode():
                    graphs.capture(most=1)
            else:
                self._graphs = graphs
        return StepRunner(self.model, self._cache, self.device, inputs=inputs, graphs=self._graphs, drawn=drawn)

    @torch.inference_mode()
    def _capture(self, progress: CountProgress | None = None, *, most: int | None = None) -> None:
        if self._graphs is not None:
            self._graphs.capture(progress, most=most)

    def _forget_cache(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()
        self._graphs = None
        for attention in self.model.attentions:
            attention.caches = ()
        del self._cache, self.steps

    @property
    def variants_bytes(self) -> int | None:
        return None if self._sizing is None else self._sizing.variants_bytes

    @property
    def runs_ahead(self) -> bool:
        """See `Executor`. What it draws, other ranks get before the next step."""
        return self._accelerator is not None

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
        return self._layout.block_size

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Swap and copy blocks, write K and V of all scheduled tokens, and sample where asked. Blocks until done."""
        return self.launch(output).result()

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> PendingStep:
        """See `Executor`. On a CPU the step is done when this returns.

        Raises:
            InsufficientMemoryError: the GPU has no memory left for it.
            ExecutorLostError: the GPU has failed.
        """
        if self._accelerator is None or self._sizing is None:
            return self._launch(output)
        with self._active(), watched(self._accelerator), self._sizing.computing(output.num_tokens):
            return WatchedStep(self._launch(output), self._accelerator)

    def _launch(self, output: SchedulerOutput) -> PendingStep:
        with self.profiler.span("prepare"):
            batch = self._builder.build(output)
        bound = _bound_variants(output.scheduled) if batch.segments else {}
        swap_s = self._move_blocks(batch.blocks)
        with self.profiler.span("forward", rows=batch.num_tokens):
            hidden = self.steps.forward(batch, bound)  # [T, hidden]
        prompt_logprobs = self._prompt_logprobs(output.scheduled, batch, hidden, bound)
        sampled = _sampled_rows(output.scheduled)
        if not sampled:
            return LaunchedStep(self.steps, None, prompt_logprobs, swap_s, bound, end_of_launched(self.device))
        with self.profiler.span("logits", rows=len(sampled)):
            logits = self.steps.logits(batch, hidden, bound)
            extra = self.steps.extra_logits(batch, hidden, bound)
            if batch.repeats is not None:
                logits = logits[to_device(torch.from_numpy(batch.repeats), self.device)]
        with self.profiler.span("sample", rows=len(sampled)):
            if extra:
                rows = np.arange(len(sampled)) if batch.repeats is None else batch.repeats
                samples: PendingSamples = sample_by_vocabulary(self._sampler, logits, extra, rows, sampled)
            else:
                samples = self._sampler.launch(logits, sampled)
            if self.runs_ahead:
                self.steps.remember(samples.tokens)
        return LaunchedStep(self.steps, samples, prompt_logprobs, swap_s, bound)

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
                with self.steps.waiting():
                    of_item += self._sampler.prompt_logprobs(logits, token_ids, num_top)
        return found


def _computed_once(run: Callable[[], None]) -> Callable[[], None]:
    """A `Capture` of which nothing is kept."""
    run()
    return run


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
