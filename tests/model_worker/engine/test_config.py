from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from registry.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: CacheConfig(block_size=0), "block_size"),
        (lambda: CacheConfig(num_blocks=0), "num_blocks"),
        (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs"),
        (lambda: SchedulerConfig(max_num_batched_tokens=0), "max_num_seqs"),
        (lambda: SchedulerConfig(max_num_seqs=9, max_num_batched_tokens=8), "max_num_seqs"),
        (lambda: SchedulerConfig(max_mixed_prefill_tokens=0), "max_mixed_prefill_tokens"),
        (lambda: SchedulerConfig(max_num_waiting=0), "max_num_waiting"),
        (lambda: CacheConfig(kv_cache_gib=math.nan), "kv_cache_gib"),
        (lambda: CacheConfig(kv_cache_gib=math.inf), "kv_cache_gib"),
        (lambda: CacheConfig(kv_cache_gib=-1.0), "kv_cache_gib"),
        (lambda: CacheConfig(num_blocks=7, kv_cache_gib=1.0), "num_blocks"),
        (lambda: CacheConfig(swap_space_gib=-1.0), "swap_space_gib"),
        (lambda: CacheConfig(swap_space_gib=math.inf), "swap_space_gib"),
        (lambda: SpeculationConfig(num_speculative_tokens=0), "num_speculative_tokens"),
        (lambda: SpeculationConfig(ngram_min=0), "ngram_min"),
        (lambda: SpeculationConfig(ngram_min=5, ngram_max=4), "ngram_min"),
        (lambda: EngineConfig(num_threads=0), "num_threads"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(make: Callable[[], object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert caught.value.param == param
    assert param.replace("_", "-") in str(caught.value)
