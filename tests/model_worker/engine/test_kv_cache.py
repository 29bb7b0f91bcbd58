from __future__ import annotations

import pytest
import torch

from model_worker.engine.config import CacheConfig
from model_worker.engine.kv_cache import KVCache, bytes_per_block, choose_num_blocks, choose_num_host_blocks
from model_worker.engine.layer_groups import group_layers
from model_worker.engine.layers.attention import ForwardContext, KVShape, PagedAttention
from model_worker.engine.ops.paged_attention import AttentionParams
from registry.errors import InsufficientMemoryError

CPU = torch.device("cpu")
GIB = 2**30


def test_a_block_counts_keys_and_values_of_all_layers() -> None:
    attentions = [
        PagedAttention(ForwardContext(), AttentionParams(scale=1.0), shape)
        for shape in (KVShape(2, 8, 8), KVShape(4, 24, 16))
    ]
    groups = group_layers(attentions, max_model_len=64)
    assert bytes_per_block(attentions, groups, 16, "bfloat16") == 16 * 2 * (2 * 16 + 4 * 40)


@pytest.mark.parametrize(
    ("config", "free", "expected"),
    [
        (CacheConfig(num_blocks=7), GIB, 7),
        (CacheConfig(kv_cache_gib=0.5), GIB, 512),
        (CacheConfig(), GIB, 512),  # half of what is free
        (CacheConfig(), 100 * GIB, 4096),  # no more than 4 GiB unless asked
    ],
)
def test_number_of_blocks(config: CacheConfig, free: int, expected: int) -> None:
    num_blocks = choose_num_blocks(config, 2**20, max_useful_blocks=10**9, free_bytes=free, device=CPU)
    assert num_blocks == expected


def test_no_more_blocks_than_can_be_in_use() -> None:
    config = CacheConfig()
    assert choose_num_blocks(config, 2**10, max_useful_blocks=7, free_bytes=GIB, device=CPU) == 7


@pytest.mark.parametrize("config", [CacheConfig(), CacheConfig(kv_cache_gib=2.0)])
def test_too_little_memory_is_an_error(config: CacheConfig) -> None:
    with pytest.raises(InsufficientMemoryError, match="--kv-cache-gib"):
        choose_num_blocks(config, 2**30, max_useful_blocks=100, free_bytes=GIB, device=CPU)


def test_blocks_are_copied_and_cleared_in_all_layers() -> None:
    attentions = [
        PagedAttention(ForwardContext(), AttentionParams(scale=1.0), KVShape(1, 4, value_dim)) for value_dim in (4, 2)
    ]
    cache = KVCache(
        attentions,
        group_layers(attentions, max_model_len=64),
        num_blocks=5,
        block_size=2,
        dtype="float32",
        device=CPU,
    )
    tensors = [tensor for a in attentions for tensor in a.caches]
    assert [list(tensor.shape) for tensor in tensors] == [[5, 2, 1, 4], [5, 2, 1, 4], [5, 2, 1, 4], [5, 2, 1, 2]]
    for tensor in tensors:
        assert not tensor.any()
        tensor.normal_()
    before = [tensor.clone() for tensor in tensors]
    cache.copy_blocks([(1, 3), (0, 4)])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[3], old[1])
        assert torch.equal(tensor[4], old[0])
        assert torch.equal(tensor[:3], old[:3])
    cache.clear_blocks([2])
    for tensor, old in zip(tensors, before, strict=True):
        assert not tensor[2].any()
        assert torch.equal(tensor[:2], old[:2])
    cache.copy_blocks([])
    cache.clear_blocks([])


def _cache(pattern: tuple[int | None, ...], **sizes: int) -> tuple[KVCache, list[PagedAttention]]:
    """A cache for layers with these windows."""
    attentions = [
        PagedAttention(ForwardContext(), AttentionParams(scale=1.0, sliding_window=window), KVShape(1, 4, 2))
        for window in pattern
    ]
    groups = group_layers(attentions, max_model_len=64)
    return KVCache(attentions, groups, block_size=2, dtype="float32", device=CPU, **sizes), attentions


def test_layers_of_different_groups_share_memory_and_those_of_one_do_not() -> None:
    _, (a, b, c, d) = _cache((8, None, 8, None), num_blocks=3)
    assert (a.group, b.group, c.group, d.group) == (0, 1, 0, 1)
    assert a.caches[0] is b.caches[0]
    assert c.caches[1] is d.caches[1]
    assert a.caches[0] is not c.caches[0]


def test_swapped_blocks_come_back_as_they_were() -> None:
    cache, attentions = _cache((None, None), num_blocks=4, num_host_blocks=3)
    tensors = [tensor for a in attentions for tensor in a.caches]
    for tensor in tensors:
        tensor.normal_()
    before = [tensor.clone() for tensor in tensors]
    cache.swap_out([(1, 2), (3, 0)])
    cache.clear_blocks([1, 3])
    cache.swap_in([(0, 1), (2, 0)])
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[1], old[3])
        assert torch.equal(tensor[0], old[1])
        assert torch.equal(tensor[2], old[2])
        assert not tensor[3].any()
    cache.swap_out([])
    cache.swap_in([])


@pytest.mark.parametrize(
    ("gib", "device", "free", "expected"),
    [
        (None, "cpu", 100 * GIB, 0),  # it would be the same memory
        (None, "cuda", 100 * GIB, 4096),
        (None, "cuda", GIB, 512),
        (0.5, "cpu", GIB, 512),
        (0.0, "cuda", GIB, 0),
    ],
)
def test_number_of_host_blocks(gib: float | None, device: str, free: int, expected: int) -> None:
    config = CacheConfig(swap_space_gib=gib)
    assert choose_num_host_blocks(config, 2**20, free_bytes=free, device=torch.device(device)) == expected


def test_more_swap_space_than_there_is_is_an_error() -> None:
    with pytest.raises(InsufficientMemoryError, match="--swap-space-gib"):
        choose_num_host_blocks(CacheConfig(swap_space_gib=2.0), 2**20, free_bytes=GIB, device=CPU)
