"""Computes steps: from a SchedulerOutput to one flat batch through the model, and its samples."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from adapters.load_plan import LoadPlan
from adapters.memory import available_memory_bytes
from model_worker.engine.config import EngineConfig
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
from model_worker.engine.lora.bound_variant import VariantHost
from model_worker.engine.lora.row_segments import segments_of_rows, segments_of_step
from model_worker.engine.lora.variant import Variant
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from model_worker.engine.ops.paged_attention import AttentionMetadata
from model_worker.engine.outputs import TokenLogprobs
from model_worker.engine.sampled_row import SampledRow
from model_worker.engine.sampler import Sampler
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.speculation.drafted_sequence import DraftedSequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput, StepResult
from model_worker.engine.step_profiler import Profiler
from model_worker.engine.visibility import Visibility
from registry.errors import UnsupportedModelError

_LOGPROB_ROWS = 64  # prompt rows whose logits are held at once


class ModelRunner:
    """Owns the model and the KV cache; an `Executor`.

    Args:
        plan: what to load.
        config: cache, batch bounds, threads.
        device: where it runs.
        kernels: of this CPU, for the native decoder; None: there are none.
        profiler: records where the time of a step goes.

    Attributes:
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
    ) -> None:
        self.profiler = profiler or Profiler()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.device = torch.device(device)
        self.max_num_batched_tokens = config.scheduler.max_num_batched_tokens
        self.load_report = LoadReport()
        native = None
        if kernels is not None and self.device.type == "cpu":
            team = Team(kernels, torch.get_num_threads())
            native = NativeRoute(team, max_rows=config.scheduler.max_num_batched_tokens)
        self.model = load_model(plan, self.device, self.load_report, model_impl=config.model_impl, native=native)
        self.profiler.watch(self.model)
        self.vocab_size = self.model.vocab_size
        # An id past the vocabulary ends nothing: the model cannot produce it.
        stop_token_ids = tuple(token_id for token_id in plan.stop_token_ids if token_id < self.vocab_size)
        self._sampler = Sampler(self.vocab_size, stop_token_ids)
        block_size = config.cache.block_size
        kv_dtype = self._choose_kv_dtype(config.cache.kv_cache_dtype)
        groups = group_layers(self.model.attentions, max_model_len=plan.max_model_len)
        block_bytes = bytes_per_block(self.model.attentions, groups, block_size, kv_dtype)
        num_blocks = choose_num_blocks(
            config.cache,
            block_bytes,
            max_useful_blocks=config.scheduler.max_num_seqs
            * groups.max_blocks(
                plan.max_model_len + block_size,
                block_size=block_size,
                max_step_tokens=config.scheduler.max_num_batched_tokens,
            ),
            free_bytes=free_memory_bytes(self.device),
            device=self.device,
        )
        num_host_blocks = choose_num_host_blocks(
            config.cache,
            block_bytes,
            free_bytes=available_memory_bytes() - (num_blocks * block_bytes if self.device.type == "cpu" else 0),
            device=self.device,
        )
        self._cache = KVCache(
            self.model.attentions,
            groups,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=kv_dtype,
            device=self.device,
            num_host_blocks=num_host_blocks,
        )
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
        swap_s = self._swap(output)
        self._cache.copy_blocks(output.block_copies)
        self._cache.clear_blocks([block for item in output.scheduled for block in self._blocks_begun(item)])
        hidden = self._forward(output.scheduled)  # [T, hidden]
        sampled: list[SampledRow] = []
        rows: list[int] = []  # of `hidden`, one for each of `sampled`
        variants: list[Variant | None] = []  # of these rows
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        start = 0
        for item in output.scheduled:
            end = start + item.num_tokens
            last = end - 1 - len(item.drafts)  # of what is known
            sampled += item.sampled
            rows += [last] * len(item.sampled)
            for num in range(1, len(item.drafts) + 1):
                sampled.append(DraftedSequence(item.sequence, item.drafts[:num]))
                rows.append(last + num)
            variants += [item.sequence.variant] * (len(rows) - len(variants))
            if item.sequence.sampling.prompt_logprobs is not None:
                prompt_logprobs[item.sequence.seq_id] = self._prompt_logprobs(item, hidden[start:end])
            start = end
        if not sampled:
            return StepResult((), prompt_logprobs, swap_s)
        with self.profiler.span("logits", rows=len(rows)):
            logits = self._logits(hidden, rows, variants)
        with self.profiler.span("sample", rows=len(rows)):
            samples = self._sampler.sample(logits, sampled)
        return StepResult(tuple(samples), prompt_logprobs, swap_s)

    def _swap(self, output: SchedulerOutput) -> float:
        """Returns the seconds that it took."""
        if not output.swapped:
            return 0.0
        start_s = time.perf_counter()
        with self.profiler.span("swap", blocks=len(output.swap_out) + len(output.swap_in)):
            self._cache.swap_out(output.swap_out)
            self._cache.swap_in(output.swap_in)
        return time.perf_counter() - start_s

    def _forward(self, scheduled: SequenceOf[ScheduledSequence]) -> Tensor:
        """Run the model once over all scheduled tokens. -> [T, hidden]"""
        context = self.model.context
        with self.profiler.span("prepare"):
            input_ids, metadata, slot_mapping = self._batch(scheduled)
            context.further_groups = tuple(
                self._tables_of_group(scheduled, group, metadata) for group in range(1, len(self.groups))
            )
        context.metadata, context.slot_mapping = metadata, slot_mapping
        context.variants = segments_of_step(scheduled)
        try:
            with self.profiler.span("forward", rows=len(input_ids)):
                return self.model(input_ids, metadata.positions)
        finally:
            context.metadata = context.slot_mapping = None
            context.further_groups = ()
            context.variants = ()

    def _batch(self, scheduled: SequenceOf[ScheduledSequence]) -> tuple[Tensor, AttentionMetadata, Tensor]:
        """Token ids [T], what attention needs to know of them, and the KV cache slot [T] of each."""
        input_ids, positions, slots = [], [], []
        query_start = [0]
        for item in scheduled:
            end = item.start + item.num_tokens
            query_start.append(query_start[-1] + item.num_tokens)
            input_ids += item.sequence.token_ids[item.start : end]
            input_ids += item.drafts
            positions.append(np.arange(item.start, end))
            slots.append(self._slots(item.sequence.block_table, positions[-1]))
        metadata = AttentionMetadata(
            block_tables=self._block_tables(scheduled),
            query_start=tuple(query_start),
            seq_lens=tuple(item.start + item.num_tokens for item in scheduled),
            positions=torch.from_numpy(np.concatenate(positions)).to(self.device),
        )
        slot_mapping = torch.from_numpy(np.concatenate(slots)).to(self.device)
        return torch.tensor(input_ids, device=self.device), metadata, slot_mapping

    def _tables_of_group(
        self, scheduled: SequenceOf[ScheduledSequence], group: int, metadata: AttentionMetadata
    ) -> tuple[AttentionMetadata, Tensor]:
        """The same batch for another layer group, and the KV cache slot [T] of each token there."""
        slots = [
            self._slots(item.sequence.block_tables[group], np.arange(item.start, item.start + item.num_tokens))
            for item in scheduled
        ]
        other = replace(metadata, block_tables=self._block_tables(scheduled, group), plans={})
        return other, torch.from_numpy(np.concatenate(slots)).to(self.device)

    def _slots(self, block_table: list[int], positions: np.ndarray) -> np.ndarray:
        """KV cache slots of consecutive positions. -> int64"""
        first = int(positions[0]) // self.block_size
        last = int(positions[-1]) // self.block_size
        blocks = np.array(block_table[first : last + 1], dtype=np.int64)
        slots: np.ndarray = blocks[positions // self.block_size - first] * self.block_size + positions % self.block_size
        return slots

    def _blocks_begun(self, item: ScheduledSequence) -> list[int]:
        """Blocks whose first slot is written by the item, but not all of them. At most one a group, the last."""
        end = item.start + item.num_tokens
        begun = end // self.block_size * self.block_size  # where the last block begins, if it stays incomplete
        if not item.start <= begun < end:
            return []
        return [table[begun // self.block_size] for table in item.sequence.block_tables]

    def _block_tables(self, scheduled: SequenceOf[ScheduledSequence], group: int = 0) -> Tensor:
        """[S, max_blocks] int32, padded with block 0."""
        num_blocks = [-(-(item.start + item.num_tokens) // self.block_size) for item in scheduled]
        tables = np.zeros((len(scheduled), max(num_blocks)), dtype=np.int32)
        for row, (item, num) in enumerate(zip(scheduled, num_blocks, strict=True)):
            tables[row, :num] = item.sequence.block_tables[group][:num]
        return torch.from_numpy(tables).to(self.device)

    def _logits(self, hidden: Tensor, rows: list[int], variants: list[Variant | None]) -> Tensor:
        """hidden [T, hidden] -> [len(rows), vocab]; equal rows are computed once and then repeated."""
        variant_of = dict(zip(rows, variants, strict=True))
        unique = list(variant_of)
        if len(unique) != len(hidden):
            hidden = hidden[torch.tensor(unique, device=self.device)]
        logits = self._head(hidden, list(variant_of.values()))
        if len(unique) == len(rows):
            return logits
        place = {row: i for i, row in enumerate(unique)}
        return logits[torch.tensor([place[row] for row in rows], device=self.device)]

    def _head(self, hidden: Tensor, variants: SequenceOf[Variant | None]) -> Tensor:
        """hidden [R, hidden], the variants of its rows -> [R, vocab]"""
        segments = segments_of_rows(variants)
        if not segments:
            return self.model.logits(hidden)
        assert isinstance(self.model, VariantHost)
        return self.model.logits(hidden, segments)

    def _prompt_logprobs(self, item: ScheduledSequence, hidden: Tensor) -> list[TokenLogprobs]:
        """Logprobs of the prompt's tokens after each of the item's positions; hidden [num_tokens, hidden]."""
        sequence = item.sequence
        num_top = sequence.sampling.prompt_logprobs
        assert num_top is not None
        targets = sequence.token_ids[item.start + 1 : min(item.start + item.num_tokens + 1, sequence.num_prompt_tokens)]
        found: list[TokenLogprobs] = []
        for start in range(0, len(targets), _LOGPROB_ROWS):
            piece = targets[start : start + _LOGPROB_ROWS]
            logits = self._head(hidden[start : start + len(piece)], [sequence.variant] * len(piece))
            found += self._sampler.prompt_logprobs(logits, piece, num_top)
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
