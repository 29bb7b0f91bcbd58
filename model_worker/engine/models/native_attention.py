"""The attention of one layer of the native decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.layers.attention import KVShape
from model_worker.engine.ops.paged_attention import AttentionParams
from model_worker.engine.ops.paged_attention.native_kv import KVFormat, NativeKVLayout

KV_FORMATS = {
    "float32": KVFormat.FLOAT32,
    "bfloat16": KVFormat.BFLOAT16,
    "float16": KVFormat.FLOAT16,
    "int8": KVFormat.INT8,
    "float8_e4m3fn": KVFormat.FLOAT8,
}


class NativeAttention:
    """Constants of a layer and its part of the KV cache; what computes it are operations of the decoder's program.

    Attributes:
        params: constants of the layer.
        kv_shape: what it keeps of each token.
        group: of layers, whose block table it reads; set by `KVCache`.
        caches: one tensor [num_blocks, block_bytes] uint8; none until there is a KV cache.
        layout: of a block.
    """

    def __init__(self, params: AttentionParams, kv_shape: KVShape) -> None:
        self.params = params
        self.kv_shape = kv_shape
        self.group = 0
        self.caches: tuple[Tensor, ...] = ()
        self.layout: NativeKVLayout | None = None

    def block_bytes(self, block_size: int, dtype: str) -> int:
        return self._layout(block_size, dtype).block_bytes

    def allocate(
        self, num_blocks: int, block_size: int, dtype: str, device: torch.device, *, pinned: bool = False
    ) -> tuple[Tensor, ...]:
        assert device.type == "cpu"
        return (self._layout(block_size, dtype).allocate(num_blocks),)

    def use_cache(self, tensors: tuple[Tensor, ...], block_size: int, dtype: str) -> None:
        self.caches = tensors
        self.layout = self._layout(block_size, dtype)

    def _layout(self, block_size: int, dtype: str) -> NativeKVLayout:
        shape = self.kv_shape
        return NativeKVLayout(block_size, shape.num_kv_heads, shape.key_dim, shape.value_dim, KV_FORMATS[dtype])
