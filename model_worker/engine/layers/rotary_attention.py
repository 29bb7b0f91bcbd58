"""Attention of layers whose queries and keys are rotated in the pass that writes keys and values to the cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_worker.engine.layers.attention import PagedAttention
from model_worker.engine.ops.paged_attention.functional import paged_attention
from model_worker.engine.ops.rotary.functional import RotaryCosSin, rotary_table, rotate_and_write


class RotaryAttention(PagedAttention):
    """The `PagedAttention` of such a layer."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, table: RotaryCosSin | None = None) -> Tensor:
        """Rotate, keep the step's keys and values, then attend.

        Args:
            query: [T, H, D], key: [T, Hkv, D], value: [T, Hkv, Dv], of the tokens in the context. Query and key are
                changed.
            table: of the tokens; None: nothing is rotated.

        Returns:
            [T, H, Dv]
        """
        metadata, slot_mapping = self._context.of_group(self.group)
        assert self.caches, "the KV cache is not allocated"
        key_cache, value_cache = self.caches
        rotate_and_write(query, key, value, table, key_cache, value_cache, slot_mapping)
        return paged_attention(query, key_cache, value_cache, metadata, self.params)


class RotaryTable(nn.Module):
    """Cosines and sines of a step's tokens, for all layers that share frequencies.

    Args:
        inverse_frequencies: [R / 2] float32.
        attention_scaling: of cosines and sines.
        dtype: of queries and keys.
    """

    inverse_frequencies: Tensor

    def __init__(
        self, inverse_frequencies: Tensor, attention_scaling: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self._attention_scaling = attention_scaling
        self._dtype = dtype
        self.register_buffer("inverse_frequencies", inverse_frequencies.float().to(device), persistent=False)

    def forward(self, positions: Tensor) -> RotaryCosSin:
        """positions [T] int64 -> cos and sin [T, R / 2]"""
        return rotary_table(positions, self.inverse_frequencies, self._attention_scaling, self._dtype)
