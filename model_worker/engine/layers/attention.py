"""The attention of one layer: its constants, its part of the KV cache, and the batch that the model is computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from model_worker.engine.layers.zeros import torch_dtype, zeros
from model_worker.engine.lora.bound_variant import VariantSegments
from model_worker.engine.ops.paged_attention import AttentionMetadata, AttentionParams, paged_attention, write_kv

if TYPE_CHECKING:
    from model_worker.engine.layers.row_terms import RowTerms


@dataclass(slots=True, eq=False)
class ForwardContext:
    """What the layers of one model need to know of the step under way; owned by the model, set before each step.

    Attributes:
        metadata: the batch, with the block tables of the first layer group; None between steps.
        slot_mapping: [T] int64, the KV cache slot of each token in the first layer group.
        further_groups: both for each other layer group, which few models have.
        variants: the rows that use a variant.
        terms: what stands for `variants` in a graph that is captured (GpuDecoder.graph_terms).
    """

    metadata: AttentionMetadata | None = None
    slot_mapping: Tensor | None = None
    further_groups: tuple[tuple[AttentionMetadata, Tensor], ...] = ()
    variants: VariantSegments = ()
    terms: RowTerms | None = None

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


class AttentionLayer(Protocol):
    """One layer's attention, as the KV cache sees it.

    Attributes:
        params: constants of the layer.
        kv_shape: what it keeps of each token.
        group: of layers, whose block table it reads; set by `KVCache`.
        caches: the tensors [num_blocks, ...] that it uses; none before there is a KV cache.
    """

    params: AttentionParams
    kv_shape: KVShape
    group: int
    caches: tuple[Tensor, ...]

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of a block whose numbers are of this type."""
        ...

    def allocate(
        self, num_blocks: int, block_size: int, dtype: str, device: torch.device, *, pinned: bool = False
    ) -> tuple[Tensor, ...]:
        """Tensors [num_blocks, ...] of zeros, for this layer or any other of its shape."""
        ...

    def use_cache(self, tensors: tuple[Tensor, ...], block_size: int, dtype: str) -> None:
        """Read from and write to these tensors, which `allocate` made, from now on."""
        ...


class PagedAttention:
    """Attached to each attention module of a model.

    Attributes:
        params: constants of the layer.
        kv_shape: what it keeps of each token.
        query_temperature: scaling of queries by position, or None.
        caches: keys [num_blocks, block_size, Hkv, D] and values [..., Dv]; none until there is a KV cache.
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
        self.caches: tuple[Tensor, ...] = ()
        self.group = 0
        self._context = context

    def block_bytes(self, block_size: int, dtype: str) -> int:
        return block_size * self.kv_shape.num_elements * torch_dtype(dtype).itemsize

    def allocate(
        self, num_blocks: int, block_size: int, dtype: str, device: torch.device, *, pinned: bool = False
    ) -> tuple[Tensor, ...]:
        lead = (num_blocks, block_size, self.kv_shape.num_kv_heads)
        return tuple(
            zeros((*lead, width), torch_dtype(dtype), device, pinned=pinned)
            for width in (self.kv_shape.key_dim, self.kv_shape.value_dim)
        )

    def use_cache(self, tensors: tuple[Tensor, ...], block_size: int, dtype: str) -> None:
        self.caches = tensors

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the step's keys and values, then attend.

        Args:
            query: [T, H, D]; key: [T, Hkv, D]; value: [T, Hkv, Dv], of the tokens in the context.

        Returns:
            [T, H, Dv]
        """
        metadata, slot_mapping = self._context.of_group(self.group)
        assert self.caches, "the KV cache is not allocated"
        key_cache, value_cache = self.caches
        if self.query_temperature is not None:
            query = self.query_temperature.apply(query, metadata.positions)
        write_kv(key, value, key_cache, value_cache, slot_mapping)
        return paged_attention(query, key_cache, value_cache, metadata, self.params)
