"""Paged attention as an operation of a program; the package's docstring has the formula, native_kv.py the cache.

Slots outside the positions that the tokens of a sequence see may hold anything, NaN too: they are left out, not
multiplied by zero. Block tables are not looked at outside them either. A row's result has the same bits whatever batch
it is part of, as long as its sequence's keys and values are finite.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import Step, address, row_stride
from model_worker.engine.ops.paged_attention.metadata import AttentionMetadata, AttentionParams
from model_worker.engine.ops.paged_attention.native_kv import KVBlocks, NativeKVLayout
from model_worker.engine.ops.paged_attention.reference import paged_attention_reference

MAX_HEAD_DIM = 256
_WORKSPACE_FLOATS = 2**21
_UNLIMITED = 2**63 - 1


def allocate_workspace() -> Tensor:
    """Memory for attention that is cut over threads. One serves all layers of a program."""
    return torch.zeros(_WORKSPACE_FLOATS)


class _PagedAttentionArgs(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("kv", KVBlocks),
        ("num_heads", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sliding_window", ctypes.c_int64),
        ("chunk_size", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_floats", ctypes.c_int64),
        ("layer_group", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PagedAttention:
    """See the module's docstring.

    Attributes:
        query: [T, H * D], rotated; columns of a wider buffer.
        blocks: [num_blocks, block_bytes] uint8, the layer's cache; the step's own keys and values are in it already.
        params: without ALiBi; sinks are float32 and contiguous.
        out: [T, H * Dv]
        workspace: of `allocate_workspace`.
        layer_group: whose block tables are read.
    """

    name: str
    query: Tensor
    blocks: Tensor
    layout: NativeKVLayout
    params: AttentionParams
    out: Tensor
    workspace: Tensor
    layer_group: int = 0
    kernel: str = "rootgraft_paged_attention"

    def __post_init__(self) -> None:
        layout, sinks = self.layout, self.params.sinks
        assert self.params.alibi is None
        assert max(layout.key_dim, layout.value_dim) <= MAX_HEAD_DIM
        assert self.query.shape[1] % layout.key_dim == 0
        assert self._num_heads % layout.num_kv_heads == 0
        assert self.out.shape[1] == self._num_heads * layout.value_dim
        assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == (self._num_heads,))

    @property
    def _num_heads(self) -> int:
        return self.query.shape[1] // self.layout.key_dim

    def arguments(self) -> ctypes.Structure:
        params = self.params
        return _PagedAttentionArgs(
            address(self.query),
            row_stride(self.query),
            address(self.out),
            row_stride(self.out),
            self.layout.describe(self.blocks),
            self._num_heads,
            params.scale,
            math.inf if params.softcap is None else params.softcap,
            _UNLIMITED if params.sliding_window is None else params.sliding_window,
            _UNLIMITED if params.chunk_size is None else params.chunk_size,
            address(params.sinks),
            address(self.workspace),
            self.workspace.numel(),
            self.layer_group,
        )

    def reference(self, step: Step) -> None:
        for sequence, seq_len in enumerate(step.seq_lens.tolist()):
            start, end = step.query_start[sequence : sequence + 2].tolist()
            first = self.params.first_visible(seq_len - (end - start))
            table = step.block_tables[self.layer_group, sequence].clone()
            table[: first // self.layout.block_size] = 0  # blocks that no row sees any more may be gone
            keys, values = self.layout.gather(self.blocks, table, seq_len)
            keys[:first], values[:first] = 0.0, 0.0
            metadata = AttentionMetadata(
                torch.tensor([[0]], dtype=torch.int32), (0, end - start), (seq_len,), step.positions[start:end]
            )
            query = self.query[start:end].view(end - start, self._num_heads, self.layout.key_dim)
            out = paged_attention_reference(query, keys[None], values[None], metadata, self.params)
            self.out[start:end] = out.flatten(1)

    def bytes_moved(self, step: Step) -> int:
        rows = 4 * step.num_rows * (self.query.shape[1] + self.out.shape[1])
        return rows + self.layout.token_bytes * sum(end - begin for begin, end, _ in self._visible(step))

    def flops(self, step: Step) -> int:
        scores = sum(
            sum(position + 1 - self.params.first_visible(position) for position in range(end - num_tokens, end))
            for _, end, num_tokens in self._visible(step)
        )
        return 2 * self._num_heads * (self.layout.key_dim + self.layout.value_dim) * scores

    def _visible(self, step: Step) -> list[tuple[int, int, int]]:
        """For each sequence the positions [begin, end) that any of its tokens sees, and the number of its tokens."""
        lengths = step.seq_lens.tolist()
        num_tokens = step.query_start.diff().tolist()
        return [
            (self.params.first_visible(length - num), length, num)
            for length, num in zip(lengths, num_tokens, strict=True)
        ]
