"""From a StepBatch to hidden states and logits: what every rank does of a step. Samples nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_worker.engine.decode_graphs import DecodeGraphs, set_step
from model_worker.engine.extra_logits import ExtraLogits
from model_worker.engine.kv_cache import KVCache
from model_worker.engine.lora.bound_variant import BoundVariant, VariantHost, VariantSegment, VariantSegments
from model_worker.engine.models.causal_model import CausalModel
from model_worker.engine.ops.low_rank import to_device
from model_worker.engine.ops.paged_attention import AttentionMetadata
from model_worker.engine.step_batch import BlockMoves, PromptRows, RowSegment, StepBatch
from model_worker.engine.step_inputs import HostInputs, StepInputs, StepTensors

BoundVariants = Mapping[int, BoundVariant]
"""By the variants' numbers; has at least those of the batch."""


class StepRunner:
    """Computes batches with one model and its KV cache, in the order in which they come.

    Args:
        model: finished; its attentions use `cache`.
        inputs: brings batches to the device; None: they are used as they are, on CPUs.
        graphs: of decode steps, over the same inputs and `drawn`; None: all steps are computed eagerly.
        drawn: see there; None: it is not needed, because no token is ever pending.

    Attributes:
        drawn: [most samples of a step] int64 on the device, what the last step drew.
    """

    def __init__(
        self,
        model: CausalModel,
        cache: KVCache,
        device: torch.device,
        *,
        inputs: StepInputs | None = None,
        graphs: DecodeGraphs | None = None,
        drawn: Tensor | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._inputs = HostInputs() if inputs is None else inputs
        self._graphs = graphs
        self.drawn = torch.zeros(0, dtype=torch.int64, device=device) if drawn is None else drawn
        self._logit_rows: Tensor | None = None  # of the last batch; not of one that was replayed
        self._logits: Tensor | None = None  # of one that was

    def move_blocks(self, moves: BlockMoves) -> None:
        """Swap, copy and clear blocks; waits for the swapping."""
        self._cache.swap_out(moves.swap_out)
        self._cache.swap_in(moves.swap_in)
        self._cache.copy_blocks(moves.copies)
        if self._device.type == "cpu":  # elsewhere attention does not read past the end of a sequence
            self._cache.clear_blocks(moves.cleared)

    def forward(self, batch: StepBatch, variants: BoundVariants) -> Tensor:
        """Write K and V of all tokens. -> [T, hidden], until the next call"""
        segments = _bound(batch.segments, variants)
        self._logit_rows = self._logits = None
        if self._graphs is not None and (replayed := self._graphs.replay(batch, segments)) is not None:
            self._logits = replayed.logits
            return replayed.hidden
        tensors = self._inputs.load(batch)
        self._logit_rows = tensors.logit_rows
        context = self._model.context
        set_step(context, _metadata(batch, tensors), tensors)
        context.variants = segments
        try:
            return self._model(tensors.known_input_ids(self.drawn), tensors.positions)
        finally:
            context.metadata = context.slot_mapping = None
            context.further_groups = ()
            context.variants = ()

    def remember(self, tokens: Tensor) -> None:
        """What this step has drawn, [samples] int64 on the device: the next step's pending tokens are among it."""
        self.drawn[: len(tokens)].copy_(tokens)

    def logits(self, batch: StepBatch, hidden: Tensor, variants: BoundVariants) -> Tensor:
        """Of `batch.logit_rows`. hidden [T, hidden] -> [R, vocab] of a floating dtype, until the next call"""
        if self._logits is not None:
            return self._logits
        if len(batch.logit_rows) != len(hidden):
            assert self._logit_rows is not None
            hidden = hidden[self._logit_rows]
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
        return torch.cat([logits, self._extra(hidden, np.arange(rows.start, rows.end), variants[rows.variant])], dim=1)

    def waiting(self) -> AbstractContextManager[None]:
        """Around waiting for what was launched here."""
        return nullcontext()

    def _extra(self, hidden: Tensor, rows: npt.NDArray[np.int64], variant: BoundVariant) -> Tensor:
        """hidden [T, hidden] of which `rows` [n] are wanted -> [n, E]"""
        assert isinstance(self._model, VariantHost)
        return self._model.extra_logits(hidden[to_device(torch.from_numpy(rows), self._device)], variant)

    def _head(self, hidden: Tensor, segments: VariantSegments) -> Tensor:
        if not segments:
            return self._model.logits(hidden)
        assert isinstance(self._model, VariantHost)
        return self._model.logits(hidden, segments)


def _bound(segments: Iterable[RowSegment], variants: BoundVariants) -> VariantSegments:
    return tuple([VariantSegment(start, end, variants[number]) for start, end, number in segments])


def _metadata(batch: StepBatch, tensors: StepTensors) -> list[AttentionMetadata]:
    """For each layer group."""
    return [
        AttentionMetadata(
            block_tables=tables,
            query_start=batch.query_start,
            seq_lens=batch.seq_lens,
            positions=tensors.positions,
            device_seq_lens=tensors.seq_lens,
        )
        for tables in tensors.block_tables
    ]
