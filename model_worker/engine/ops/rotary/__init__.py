"""Rotary position embedding, and writing keys and values to the cache of the CPU kernels.

    RotaryTable     cos[t, i] = cos(p f[i]) * c,  sin[t, i] = sin(p f[i]) * c        p = step.positions[t]
                    the product p f[i] is rounded to float32 first, as transformers does

    RotaryKV        for every head of query and key, and i < R / 2, in place:
                    x[i]          <-  x[i] cos[t, i] - x[i + R / 2] sin[t, i]
                    x[i + R / 2]  <-  x[i + R / 2] cos[t, i] + x[i] sin[t, i]
                    then key and value of token t go to slot step.slot_mapping[layer group, t] of the cache

        f          [R / 2] float32, inverse frequencies; c, the attention scaling, is a number
        cos, sin   [T, R / 2] float32, contiguous
        x          a head of [T, heads * D] float32, rows contiguous; elements from R on stay as they are

A table is filled once a step for each set of frequencies that the model has. Source: Su et al., arXiv 2104.09864,
section 3.4.2; the scaling is that of YaRN, arXiv 2309.00071, section 3.4.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import Step, address, row_stride
from model_worker.engine.ops.paged_attention.native_kv import KVBlocks, NativeKVLayout

__all__ = ["RotaryKV", "RotaryTable"]


class _RotaryTableArgs(ctypes.Structure):
    _fields_ = (
        ("inverse_frequencies", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("attention_scaling", ctypes.c_float),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """See the package's docstring."""

    name: str
    inverse_frequencies: Tensor
    attention_scaling: float
    cos: Tensor
    sin: Tensor
    kernel: str = "rootgraft_rotary_table"

    @classmethod
    def allocate(
        cls, name: str, inverse_frequencies: Tensor, attention_scaling: float, max_num_rows: int
    ) -> RotaryTable:
        """A table with buffers of its own for steps of up to `max_num_rows` tokens."""
        shape = (max_num_rows, len(inverse_frequencies))
        frequencies = inverse_frequencies.float().contiguous()
        return cls(name, frequencies, attention_scaling, torch.zeros(shape), torch.zeros(shape))

    def __post_init__(self) -> None:
        assert self.inverse_frequencies.dtype == torch.float32
        assert self.cos.is_contiguous()
        assert self.sin.is_contiguous()
        assert self.cos.shape == self.sin.shape
        assert self.cos.shape[1] == len(self.inverse_frequencies)

    def arguments(self) -> ctypes.Structure:
        return _RotaryTableArgs(
            address(self.inverse_frequencies),
            len(self.inverse_frequencies),
            self.attention_scaling,
            address(self.cos),
            address(self.sin),
        )

    def reference(self, step: Step) -> None:
        angles = step.positions.float()[:, None] * self.inverse_frequencies
        self.cos[: step.num_rows] = angles.cos() * self.attention_scaling
        self.sin[: step.num_rows] = angles.sin() * self.attention_scaling

    def bytes_moved(self, step: Step) -> int:
        return 8 * step.num_rows * self.cos.shape[1]

    def flops(self, step: Step) -> int:
        return 0


class _RotaryKVArgs(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        ("kv", KVBlocks),
        ("layer_group", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class RotaryKV:
    """See the package's docstring.

    Attributes:
        query: [T, H * D], key: [T, Hkv * D], value: [T, Hkv * Dv]; columns of one buffer.
        table: filled in the same step; None: queries and keys stay as they are.
        blocks: [num_blocks, block_bytes] uint8, the layer's cache.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    table: RotaryTable | None
    blocks: Tensor
    layout: NativeKVLayout
    layer_group: int = 0
    kernel: str = "rootgraft_rotary_kv"

    def __post_init__(self) -> None:
        layout = self.layout
        assert row_stride(self.query) == row_stride(self.key) == row_stride(self.value)
        assert self.query.shape[1] % layout.key_dim == 0
        assert self.key.shape[1] == layout.num_kv_heads * layout.key_dim
        assert self.value.shape[1] == layout.num_kv_heads * layout.value_dim
        assert self.table is None or 2 * self.table.cos.shape[1] <= layout.key_dim

    @property
    def _num_heads(self) -> int:
        return self.query.shape[1] // self.layout.key_dim

    def arguments(self) -> ctypes.Structure:
        table = self.table
        return _RotaryKVArgs(
            address(self.query),
            address(self.key),
            address(self.value),
            row_stride(self.query),
            self._num_heads,
            None if table is None else address(table.cos),
            None if table is None else address(table.sin),
            0 if table is None else table.cos.shape[1],
            self.layout.describe(self.blocks),
            self.layer_group,
        )

    def reference(self, step: Step) -> None:
        num_rows, layout = step.num_rows, self.layout
        query = self.query[:num_rows].view(num_rows, self._num_heads, layout.key_dim)
        key = self.key[:num_rows].view(num_rows, layout.num_kv_heads, layout.key_dim)
        value = self.value[:num_rows].view(num_rows, layout.num_kv_heads, layout.value_dim)
        if self.table is not None:
            cos, sin = self.table.cos[:num_rows, None], self.table.sin[:num_rows, None]
            _rotate(query, cos, sin)
            _rotate(key, cos, sin)
        layout.scatter(self.blocks, step.slot_mapping[self.layer_group], key, value)

    def bytes_moved(self, step: Step) -> int:
        rotated = 0 if self.table is None else 2 * (self.query.shape[1] + self.key.shape[1])
        return step.num_rows * (4 * (rotated + self.key.shape[1] + self.value.shape[1]) + self.layout.token_bytes)

    def flops(self, step: Step) -> int:
        return 0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x [T, heads, D], cos and sin [T, 1, R / 2]; in place."""
    half = cos.shape[-1]
    first, second = x[..., :half].clone(), x[..., half : 2 * half].clone()
    x[..., :half] = first * cos - second * sin
    x[..., half : 2 * half] = second * cos + first * sin
