"""The paged KV cache: how many blocks there can be, and the tensors that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from adapters.memory import available_memory_bytes
from model_worker.engine.config import CacheConfig
from model_worker.engine.layers.attention import KVShape, PagedAttention
from registry.errors import InsufficientMemoryError

_GIB = 2**30
_SHARE_OF_FREE_MEMORY = 0.5  # of what is free once the weights are there
_MAX_DEFAULT_BYTES = 4 * _GIB  # where nobody asked for a size, for CPUs: the memory is other programs' too


def bytes_per_block(shapes: Sequence[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers."""
    return block_size * dtype.itemsize * sum(shape.num_elements for shape in shapes)


def choose_num_blocks(
    config: CacheConfig, block_bytes: int, *, max_useful_tokens: int, free_bytes: int, device: torch.device
) -> int:
    """How many blocks to allocate.

    Args:
        config: `num_blocks` goes before `kv_cache_gib`, which goes before half of the free memory.
        block_bytes: see `bytes_per_block`.
        max_useful_tokens: more can never be in use; bounds only the default.
        free_bytes: memory that is free.

    Raises:
        InsufficientMemoryError: not even one block, or more than is free.
    """
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_gib is not None:
        num_blocks = int(config.kv_cache_gib * _GIB) // block_bytes
    else:
        budget = int(free_bytes * _SHARE_OF_FREE_MEMORY)
        if device.type == "cpu":
            budget = min(budget, _MAX_DEFAULT_BYTES)
        num_blocks = min(budget // block_bytes, -(-max_useful_tokens // config.block_size))
    if num_blocks < 1 or num_blocks * block_bytes > free_bytes:
        raise InsufficientMemoryError(
            f"A KV cache of {num_blocks} blocks needs {num_blocks * block_bytes / _GIB:.2f} GiB (at least 1 block of "
            f"{block_bytes / 2**20:.2f} MiB), and {free_bytes / _GIB:.2f} GiB are free; change --kv-cache-gib or "
            "--num-blocks, or free memory."
        )
    return num_blocks


def free_memory_bytes(device: torch.device) -> int:
    """What may still be taken on a device; for CPUs less than the machine has free under a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()


class KVCache:
    """Keys and values of all layers: for each, [num_blocks, block_size, Hkv, D] and [num_blocks, block_size, Hkv, Dv].

    Starts as zeros: attention reads whole blocks, and what it reads must be finite.
    """

    def __init__(
        self,
        attentions: Sequence[PagedAttention],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._attentions = attentions
        self._device = device
        for attention in attentions:
            shape = attention.kv_shape
            lead = (num_blocks, block_size, shape.num_kv_heads)
            attention.key_cache = _zeros((*lead, shape.key_dim), dtype, device)
            attention.value_cache = _zeros((*lead, shape.value_dim), dtype, device)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers; every source is read before any destination is written."""
        if not copies:
            return
        sources, destinations = torch.tensor(copies, device=self._device).unbind(1)
        for cache in self._tensors():
            cache.index_copy_(0, destinations, cache.index_select(0, sources))

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros in all layers.

        Attention reads whole blocks and gives weight zero to the slots past the end of a sequence, and zero times NaN
        is NaN. So a block gets a new owner clean: what a failed sequence left there must not spoil the next one.
        """
        if not blocks:
            return
        index = torch.tensor(blocks, device=self._device)
        for cache in self._tensors():
            cache.index_fill_(0, index, 0.0)

    def _tensors(self) -> Iterator[Tensor]:
        for attention in self._attentions:
            for cache in (attention.key_cache, attention.value_cache):
                assert cache is not None
                yield cache


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on CPUs, is taken from the system page by page when it is first written.

    torch.zeros writes every page at once: seconds for a large cache of which most may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)
