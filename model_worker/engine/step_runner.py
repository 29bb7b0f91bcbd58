"""From a StepBatch to hidden states and logits: what every rank does of a step. Samples nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_worker.engine.extra_logits import ExtraLogits
from model_worker.engine.kv_cache import KVCache
from model_worker.engine.lora.bound_variant import BoundVariant, VariantHost, VariantSegment, VariantSegments
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.ops.paged_attention import AttentionMetadata
from model_worker.engine.step_batch import BlockMoves, PromptRows, RowSegment, StepBatch

BoundVariants = Mapping[int, BoundVariant]
"""By the variants' numbers; has at least those of the batch."""


class StepRunner:
    """Computes batches with one model and its KV cache, in the order in which they come.

    Args:
        model: finished; its attentions use `cache`.
    """

    def __init__(self, model: CausalModel, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._device = device

    def move_blocks(self, moves: BlockMoves) -> None:
        """Swap, copy and clear blocks; waits for the swapping."""
        self._cache.swap_out(moves.swap_out)
        self._cache.swap_in(moves.swap_in)
        self._cache.copy_blocks(moves.copies)
        self._cache.clear_blocks(moves.cleared)

    def forward(self, batch: StepBatch, variants: BoundVariants) -> Tensor:
        """Write K and V of all tokens. -> [T, hidden], until the next call"""
        context = self._model.context
        slots = [torch.from_numpy(of_group).to(self._device) for of_group in batch.slot_mapping]
        tables = [torch.from_numpy(of_group).to(self._device) for of_group in batch.block_tables]
        metadata = AttentionMetadata(
            block_tables=tables[0],
            query_start=batch.query_start,
            seq_lens=batch.seq_lens,
            positions=torch.from_numpy(batch.positions).to(self._device),
        )
        context.metadata, context.slot_mapping = metadata, slots[0]
        context.further_groups = tuple(
            (replace(metadata, block_tables=table, plans={}), slot)
            for table, slot in zip(tables[1:], slots[1:], strict=True)
        )
        context.variants = _bound(batch.segments, variants)
        try:
            return self._model(torch.from_numpy(batch.input_ids).to(self._device), metadata.positions)
        finally:
            context.metadata = context.slot_mapping = None
            context.further_groups = ()
            context.variants = ()

    def logits(self, batch: StepBatch, hidden: Tensor, variants: BoundVariants) -> Tensor:
        """Of `batch.logit_rows`. hidden [T, hidden] -> [R, vocab], until the next call"""
        if len(batch.logit_rows) != len(hidden):
            hidden = hidden[torch.from_numpy(batch.logit_rows).to(self._device)]
        return self._head(hidden, _bound(batch.logit_segments, variants))

    def extra_logits(self, batch: StepBatch, hidden: Tensor, variants: BoundVariants) -> list[ExtraLogits]:
        """Of those of `batch.logit_rows` whose variants have tokens beyond the base's. hidden [T, hidden]"""
        return [
            ExtraLogits(start, end, self._extra(hidden, batch.logit_rows[start:end], variants[number]))
            for start, end, number in batch.logit_segments
            if variants[number].num_extra_tokens
        ]

    def prompt_logits(self, rows: PromptRows, hidden: Tensor, variants: BoundVariants) -> Tensor:
        """hidden [T, hidden] -> [rows.end - rows.start, vocab], until the next call; with the tokens of the variant"""
        num_rows = rows.end - rows.start
        segments = () if rows.variant is None else (RowSegment(0, num_rows, rows.variant),)
        logits = self._head(hidden[rows.start : rows.end], _bound(segments, variants))
        if rows.variant is None or not variants[rows.variant].num_extra_tokens:
            return logits
        return torch.cat(
            [logits, self._extra(hidden, np.arange(rows.start, rows.end), variants[rows.variant])], dim=1
        )

    def _extra(self, hidden: Tensor, rows: npt.NDArray[np.int64], variant: BoundVariant) -> Tensor:
        """hidden [T, hidden] of which `rows` [n] are wanted -> [n, E]"""
        assert isinstance(self._model, VariantHost)
        return self._model.extra_logits(hidden[torch.from_numpy(rows).to(self._device)], variant)

    def _head(self, hidden: Tensor, segments: VariantSegments) -> Tensor:
        if not segments:
            return self._model.logits(hidden)
        assert isinstance(self._model, VariantHost)
        return self._model.logits(hidden, segments)


def _bound(segments: Iterable[RowSegment], variants: BoundVariants) -> VariantSegments:
    return tuple([VariantSegment(start, end, variants[number]) for start, end, number in segments])
