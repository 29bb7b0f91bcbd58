"""An accelerator without a GPU: its memory is a script of numbers, and captured graphs are run again by Python."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from model_worker.engine.decode_graphs import Capture
from model_worker.engine.device_sampler import launch_on_device
from model_worker.engine.gpu_memory import DeviceMemory
from model_worker.engine.layers import rotary_attention
from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.layers.bound_terms import NO_TERMS
from model_worker.engine.layers.row_terms import RowTerms
from model_worker.engine.lora.bound_variant import VariantSegments
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.paged_attention import AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.functional import paged_attention
from model_worker.engine.parallel.group import OneRank
from model_worker.engine.sampler import Sampler
from tests.fakes.device_model import FakeCapture

GIB = 2**30


class FakeMemory:
    """See DeviceMemory.

    Attributes:
        taken: what this process has taken.
    """

    def __init__(self, *, total: int = 16 * GIB, others: int = 0, peak: int = GIB) -> None:
        self.taken = 0
        self.num_trims = 0
        self._total = total
        self._others = others
        self._peak = peak

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - self._others - self.taken

    def trim(self) -> None:
        self.num_trims += 1

    def peak(self) -> int:
        return self._peak


class FakeAccelerator:
    """See Accelerator.

    Args:
        graph_bytes: that each captured graph takes.
    """

    def __init__(self, memory: FakeMemory | None = None, *, graph_bytes: int = 0) -> None:
        self._memory = memory or FakeMemory()
        self._graph_bytes = graph_bytes
        self.captures: list[FakeCapture] = []
        self.num_active = 0
        self.failed = False

    @property
    def memory(self) -> DeviceMemory:
        return self._memory

    @contextmanager
    def active(self) -> Iterator[None]:
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    def capture(self, context: ForwardContext) -> Capture:
        capture = FakeCapture(context)
        self.captures.append(capture)

        def measured(run: Callable[[], None]) -> Callable[[], None]:
            self._memory.taken += self._graph_bytes
            return capture(run)

        return measured

    def has_failed(self) -> bool:
        return self.failed

    @property
    def num_replays(self) -> int:
        return sum(capture.num_replays for capture in self.captures)


class BaseTerms(RowTerms):
    """Terms of graphs that serve no variants: on CPUs there are no tables for them."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(SegmentPlan(num_rows, (), 1), NO_TERMS, (), None)

    def serves(self, segments: VariantSegments) -> bool:
        return not segments

    def fill(self, segments: VariantSegments) -> None:
        assert not segments


def compute_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In decode steps, have attention read lengths where a kernel of a GPU does: in the tensor of the device."""

    def attention(
        query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, params: AttentionParams
    ) -> Tensor:
        if metadata.device_seq_lens is None or not metadata.is_decode:
            return paged_attention(query, key_cache, value_cache, metadata, params)
        lengths = metadata.device_seq_lens.tolist()
        num_rows = sum(length > 0 for length in lengths)
        out = torch.full((*query.shape[:2], value_cache.shape[3]), torch.nan, dtype=query.dtype)
        if num_rows:
            real = AttentionMetadata(
                metadata.block_tables[:num_rows, : -(-max(lengths) // key_cache.shape[1])],
                tuple(range(num_rows + 1)),
                tuple(lengths[:num_rows]),
                metadata.positions[:num_rows],
            )
            out[:num_rows] = paged_attention(query[:num_rows], key_cache, value_cache, real, params)
        return out

    monkeypatch.setattr(rotary_attention, "paged_attention", attention)
    monkeypatch.setattr(GpuDecoder, "graph_terms", lambda self, num_rows: (BaseTerms(num_rows),))


def pretend_to_have_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model runner compute as on one, for tests of what makes its engines by itself."""
    compute_as_on_a_gpu(monkeypatch)
    make: Callable[..., None] = ModelRunner.__init__

    @functools.wraps(make)
    def with_accelerator(self: Any, plan: Any, config: Any, **more: Any) -> None:
        make(self, plan, config, **{**more, "group": OneRank(), "accelerator": FakeAccelerator()})

    monkeypatch.setattr(ModelRunner, "__init__", with_accelerator)
    monkeypatch.setattr(
        Sampler, "launch", lambda self, logits, sequences: launch_on_device(logits, sequences, self.eos_token_ids)
    )
