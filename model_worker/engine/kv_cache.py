"""The paged KV cache: how many blocks there can be, and the tensors that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_worker.engine.config import CacheConfig
from model_worker.engine.layer_groups import LayerGroups
from model_worker.engine.layers.attention import AttentionLayer
from model_worker.engine.ops.low_rank import to_device
from registry.errors import InsufficientMemoryError

_GIB = 2**30
_SHARE_OF_FREE_MEMORY = 0.5  # of what is free once the weights are there
_DEFAULT_SWAP_BYTES = 4 * _GIB
_MAX_DEFAULT_BYTES = 4 * _GIB  # where nobody asked for a size, for CPUs: the memory is other programs' too


def bytes_per_block(attentions: Sequence[AttentionLayer], groups: LayerGroups, block_size: int, dtype: str) -> int:
    """Bytes of one block in all slots."""
    return sum(attentions[layer].block_bytes(block_size, dtype) for layer in groups.slots)


def choose_num_blocks(
    config: CacheConfig, block_bytes: int, *, max_useful_blocks: int, free_bytes: int, device: torch.device
) -> int:
    """How many blocks to allocate.

    Args:
        config: `num_blocks` or `kv_cache_gib`; with neither, half of the free memory, for GPUs all of it.
        block_bytes: see `bytes_per_block`.
        max_useful_blocks: more can never be in use; bounds only the default.
        free_bytes: memory that is free; of a GPU what the KV cache may have.

    Raises:
        InsufficientMemoryError: not even one block, or more than is free.
    """
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_gib is not None:
        num_blocks = int(config.kv_cache_gib * _GIB) // block_bytes
    else:
        budget = free_bytes
        if device.type == "cpu":
            budget = min(int(free_bytes * _SHARE_OF_FREE_MEMORY), _MAX_DEFAULT_BYTES)
        num_blocks = min(budget // block_bytes, max_useful_blocks)
    if num_blocks < 1 or num_blocks * block_bytes > free_bytes:
        raise InsufficientMemoryError(
            f"A KV cache of {num_blocks} blocks needs {num_blocks * block_bytes / _GIB:.2f} GiB (at least 1 block of "
            f"{block_bytes / 2**20:.2f} MiB), and {free_bytes / _GIB:.2f} GiB are free; change --kv-cache-gib or "
            "--num-blocks, or free memory."
        )
    return num_blocks


def choose_num_host_blocks(config: CacheConfig, block_bytes: int, *, free_bytes: int, device: torch.device) -> int:
    """How many blocks of host memory to keep for swapping.

    None by default on CPUs: the pool would be the same memory that the cache itself could have.

    Args:
        free_bytes: host memory that is free once the KV cache is there.

    Raises:
        InsufficientMemoryError: more was asked for than is free.
    """
    if config.swap_space_gib is not None:
        num_blocks = int(config.swap_space_gib * _GIB) // block_bytes
    elif device.type == "cpu":
        num_blocks = 0
    else:
        num_blocks = min(_DEFAULT_SWAP_BYTES, int(free_bytes * _SHARE_OF_FREE_MEMORY)) // block_bytes
    if num_blocks * block_bytes > free_bytes:
        raise InsufficientMemoryError(
            f"--swap-space-gib asks for {num_blocks * block_bytes / _GIB:.2f} GiB of host memory, and "
            f"{max(0, free_bytes) / _GIB:.2f} GiB are free; ask for less."
        )
    return num_blocks


class KVCache:
    """Keys and values of all layers, in tensors [num_blocks, ...] whose further layout is the attention's own.

    Layers that share a slot (see LayerGroups) share these tensors. They start as zeros. The host pool has tensors of
    the same shape with `num_host_blocks` blocks.
    """

    def __init__(
        self,
        attentions: Sequence[AttentionLayer],
        groups: LayerGroups,
        *,
        num_blocks: int,
        block_size: int,
        dtype: str,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.groups = groups
        self._device = device
        host = torch.device("cpu")
        self._tensors: list[Tensor] = []
        self._host_tensors: list[Tensor] = []
        slots = []
        for layer in groups.slots:
            allocate = attentions[layer].allocate
            slots.append(allocate(num_blocks, block_size, dtype, device))
            self._tensors += map(_as_bytes, slots[-1])
            if num_host_blocks:
                pool = allocate(num_host_blocks, block_size, dtype, host, pinned=device.type != "cpu")
                self._host_tensors += map(_as_bytes, pool)
        for group, layers in enumerate(groups.members):
            for slot, layer in enumerate(layers):
                attentions[layer].group = group
                attentions[layer].use_cache(slots[slot], block_size, dtype)

    def swap_out(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks to blocks of the host pool (block, host block) in all layers. Waits until it is done."""
        if copies:
            blocks, host_blocks = torch.tensor(copies).unbind(1)
            index = blocks.to(self._device)
            for cache, host in zip(self._tensors, self._host_tensors, strict=True):
                host.index_copy_(0, host_blocks, cache.index_select(0, index).cpu())

    def swap_in(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the host pool to blocks (host block, block) in all layers. Waits until it is done."""
        if copies:
            host_blocks, blocks = torch.tensor(copies).unbind(1)
            index = blocks.to(self._device)
            for cache, host in zip(self._tensors, self._host_tensors, strict=True):
                cache.index_copy_(0, index, host.index_select(0, host_blocks).to(self._device))
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in all layers; every source is read before any destination is written."""
        if not copies:
            return
        sources, destinations = to_device(torch.tensor(copies), self._device).unbind(1)
        for cache in self._tensors:
            cache.index_copy_(0, destinations, cache.index_select(0, sources))

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros in all layers.

        Attention reads whole blocks and gives weight zero to the slots past the end of a sequence, and zero times NaN
        is NaN. So a block gets a new owner clean: what a failed sequence left there must not spoil the next one.
        """
        if not blocks:
            return
        index = torch.tensor(blocks, device=self._device)
        for cache in self._tensors:
            cache.index_fill_(0, index, 0)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Numbers of one byte as such: torch moves and fills no float8."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
