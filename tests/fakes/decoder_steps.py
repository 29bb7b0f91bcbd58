"""A model computes sequences in steps, without an engine around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_worker.engine.lora.bound_variant import BoundVariant, VariantSegment
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.models.native_decoder import NativeDecoder
from model_worker.engine.models.transformers_model import TransformersModel
from model_worker.engine.ops.paged_attention import AttentionMetadata

MAX_MODEL_LEN = 64
BLOCK_SIZE = 16
MAX_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE

Model = NativeDecoder | GpuDecoder | TransformersModel


class Sequences:
    """Sequences that one model computes, each in blocks of its own.

    Args:
        variants: of each sequence; None: the base.
    """

    def __init__(self, model: Model, variants: Sequence[BoundVariant | None]) -> None:
        self._model = model
        self._variants = variants
        self._lengths = [0] * len(variants)
        dtype = model.kv_dtypes[0]
        for attention in model.attentions:
            tensors = attention.allocate(len(variants) * MAX_BLOCKS, BLOCK_SIZE, dtype, torch.device("cpu"))
            attention.use_cache(tensors, BLOCK_SIZE, dtype)

    @torch.no_grad()
    def step(self, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits after each of the new tokens of every sequence. -> for each [len(tokens), vocab]"""
        context = self._model.context
        starts = self._lengths
        self._lengths = [start + len(new) for start, new in zip(starts, tokens, strict=True)]
        tables = torch.arange(len(tokens) * MAX_BLOCKS, dtype=torch.int32).view(-1, MAX_BLOCKS)
        positions = [torch.arange(*limits) for limits in zip(starts, self._lengths, strict=True)]
        slots = [i * MAX_MODEL_LEN + each for i, each in enumerate(positions)]
        query_start = torch.tensor([0, *map(len, tokens)]).cumsum(0).tolist()
        context.metadata = AttentionMetadata(tables, tuple(query_start), tuple(self._lengths), torch.cat(positions))
        context.slot_mapping = torch.cat(slots)
        context.variants = tuple(
            VariantSegment(query_start[i], query_start[i + 1], variant)
            for i, variant in enumerate(self._variants)
            if variant is not None
        )
        ids = torch.tensor([token for new in tokens for token in new])
        hidden = self._model(ids, context.metadata.positions)
        logits = self._model.logits(hidden, context.variants).clone()
        return list(torch.split(logits, [len(new) for new in tokens]))
