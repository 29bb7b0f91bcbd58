"""The attention of one layer: its constants, its part of the KV cache, and the batch that the model is computing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.paged_attention import AttentionMetadata, AttentionParams, paged_attention, write_kv


@dataclass(slots=True, eq=False)
class ForwardContext:
    """What the layers of one model need to know of the step under way; owned by the model, set before each step.

    Attributes:
        metadata: the batch, with the block tables of the first layer group; None between steps.
        slot_mapping: [T] int64, the KV cache slot of each token in the first layer group.
        further_groups: both for each other layer group, which few models have.
    """

    metadata: AttentionMetadata | None = None
    slot_mapping: Tensor | None = None
    further_groups: tuple[tuple[AttentionMetadata, Tensor], ...] = ()

    def of_group(self, group: int) -> tuple[AttentionMetadata, Tensor]:
        """Metadata and slot mapping for the layers of a group."""
        if group > 0:
            return self.further_groups[group - 1]
        assert self.metadata is not None, "the model runs outside a step"
        assert self.slot_mapping is not None
        return self.metadata, self.slot_mapping


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a layer keeps of each token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class QueryTemperature:
    """Queries grow with their position: times 1 + scale * log(1 + floor((position + 1) / floor_scale)).

    Source: scalable softmax, arXiv 2501.19399, as Llama 4 uses it.
    """

    scale: float
    floor_scale: float

    def apply(self, query: Tensor, positions: Tensor) -> Tensor:
        """query [T, H, D], positions [T] -> [T, H, D]"""
        factor = torch.log1p(torch.floor((positions.float() + 1.0) / self.floor_scale)) * self.scale + 1.0
        return (query * factor[:, None, None]).to(query.dtype)


class PagedAttention:
    """Attached to each attention module of a model.

    Attributes:
        params: constants of the layer.
        kv_shape: what it keeps of each token.
        query_temperature: scaling of queries by position, or None.
        key_cache, value_cache: [num_blocks, block_size, Hkv, D] and [..., Dv]; set by `KVCache`.
        group: of layers, whose block table it reads; set by `KVCache`.
    """

    def __init__(
        self,
        context: ForwardContext,
        params: AttentionParams,
        kv_shape: KVShape,
        query_temperature: QueryTemperature | None = None,
    ) -> None:
        self.params = params
        self.kv_shape = kv_shape
        self.query_temperature = query_temperature
        self.key_cache: Tensor | None = None
        self.value_cache: Tensor | None = None
        self.group = 0
        self._context = context

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the step's keys and values, then attend.

        Args:
            query: [T, H, D]; key: [T, Hkv, D]; value: [T, Hkv, Dv], of the tokens in the context.

        Returns:
            [T, H, Dv]
        """
        metadata, slot_mapping = self._context.of_group(self.group)
        assert self.key_cache is not None, "the KV cache is not allocated"
        assert self.value_cache is not None
        if self.query_temperature is not None:
            query = self.query_temperature.apply(query, metadata.positions)
        write_kv(key, value, self.key_cache, self.value_cache, slot_mapping)
        return paged_attention(query, self.key_cache, self.value_cache, metadata, self.params)
