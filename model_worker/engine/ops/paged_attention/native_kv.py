"""The KV cache of the CPU kernels: one tensor a layer, [num_blocks, block_bytes] uint8, keys and values together.

    block       [Hkv] heads, each padded to a multiple of 64 bytes:
    head        key scales     [block_size]        float32      int8 and float8 only
                value scales   [block_size]        float32      int8 and float8 only
                keys           [D, block_size]     transposed: 16 neighbours in a row are one vector of the kernels
                values         [block_size, Dv padded to a multiple of 32]

    key[t, g]   = stored * key scale[t, g],    value[t, g] = stored * value scale[t, g]

A scale is max|x| / 127 of that token and head, for float8 max|x| / 448; not finite where an x is not. Blocks are
copied, cleared and swapped whole, by dimension 0 and nothing else; one that is all zeros holds zeros.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
_VALUE_PADDING = 32
_SMALLEST_PEAK = 2.0**-100  # as in rotary/cpu.cpp


class KVFormat(IntEnum):
    """How the numbers of a KV cache are stored; numbers as in kv_block.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3
    FLOAT8 = 4

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self]

    @property
    def largest(self) -> float | None:
        """What the largest number of a token and head is scaled to; None: the format has no scales."""
        return _LARGEST.get(self)


_DTYPES = {
    KVFormat.FLOAT32: torch.float32,
    KVFormat.BFLOAT16: torch.bfloat16,
    KVFormat.FLOAT16: torch.float16,
    KVFormat.INT8: torch.int8,
    KVFormat.FLOAT8: torch.float8_e4m3fn,
}
_LARGEST = {KVFormat.INT8: 127.0, KVFormat.FLOAT8: 448.0}


class KVBlocks(ctypes.Structure):
    """Mirrored in kv_block.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("head_bytes", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("padded_value_dim", ctypes.c_int64),
        ("format", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class NativeKVLayout:
    """Where things are in a block; see the module's docstring. Any block size is right, multiples of 16 are fast."""

    block_size: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    format: KVFormat

    @property
    def block_bytes(self) -> int:
        return self.num_kv_heads * self._head_bytes

    def allocate(self, num_blocks: int) -> Tensor:
        """Zeros, aligned; their memory is taken from the system page by page when it is first written.

        Returns:
            [num_blocks, block_bytes] uint8
        """
        num_bytes = num_blocks * self.block_bytes
        data = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
        start = -data.ctypes.data % _ALIGNMENT
        return torch.from_numpy(data[start : start + num_bytes]).view(num_blocks, self.block_bytes)

    def describe(self, blocks: Tensor) -> KVBlocks:
        """For kernels. `blocks` must stay alive and unmoved."""
        assert blocks.shape[1] == self.block_bytes
        assert blocks.dtype == torch.uint8
        assert blocks.is_contiguous()
        return KVBlocks(
            blocks.data_ptr(),
            self._head_bytes,
            self.block_size,
            self.num_kv_heads,
            self.key_dim,
            self.value_dim,
            self._padded_value_dim,
            self.format,
        )

    def gather(self, blocks: Tensor, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of a sequence, as the kernels see them.

        Args:
            blocks: [num_blocks, block_bytes] uint8
            block_table: [at least length / block_size] integers

        Returns:
            [length, Hkv, D] and [length, Hkv, Dv], float32
        """
        chosen = blocks[block_table[: -(-length // self.block_size)].long()]
        keys, values = self._keys(chosen).float(), self._values(chosen).float()
        if self.format.largest is not None:
            key_scales, value_scales = self._scales(chosen).unbind(2)
            keys, values = keys * key_scales[:, :, None], values * value_scales[..., None]
        # [N, Hkv, D, block_size], [N, Hkv, block_size, Dv] -> [N, block_size, Hkv, ...]
        keys, values = keys.permute(0, 3, 1, 2), values.transpose(1, 2)
        return keys.flatten(0, 1)[:length], values.flatten(0, 1)[:length]

    def scatter(self, blocks: Tensor, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write tokens to their slots, in place.

        Args:
            blocks: [num_blocks, block_bytes] uint8
            slot_mapping: [T] int64, block number * block_size + offset, all distinct
            keys: [T, Hkv, D] float32
            values: [T, Hkv, Dv] float32
        """
        block, offset = slot_mapping // self.block_size, slot_mapping % self.block_size
        if self.format.largest is not None:
            keys, key_scales = _quantize(keys, self.format)
            values, value_scales = _quantize(values, self.format)
            self._scales(blocks)[block, :, :, offset] = torch.stack([key_scales, value_scales], dim=2)
        self._keys(blocks)[block, :, :, offset] = keys.to(self.format.dtype)
        self._values(blocks)[block, :, offset] = values.to(self.format.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all heads that attention has to read."""
        scale_bytes = 8 if self.format.largest is not None else 0
        return self.num_kv_heads * (scale_bytes + self.format.dtype.itemsize * (self.key_dim + self.value_dim))

    @property
    def _padded_value_dim(self) -> int:
        return -(-self.value_dim // _VALUE_PADDING) * _VALUE_PADDING

    @property
    def _keys_start(self) -> int:
        return 8 * self.block_size if self.format.largest is not None else 0

    @property
    def _values_start(self) -> int:
        return self._keys_start + self.key_dim * self.block_size * self.format.dtype.itemsize

    @property
    def _head_bytes(self) -> int:
        end = self._values_start + self.block_size * self._padded_value_dim * self.format.dtype.itemsize
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    def _view(self, blocks: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A part of each head: [num_blocks, Hkv, *shape], in the same memory."""
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        heads = blocks.view(-1, self.num_kv_heads, self._head_bytes)[..., start : start + num_bytes]
        return heads.view(dtype).view(-1, self.num_kv_heads, *shape)

    def _scales(self, blocks: Tensor) -> Tensor:
        """Of keys and of values: [num_blocks, Hkv, 2, block_size] float32"""
        return self._view(blocks, 0, (2, self.block_size), torch.float32)

    def _keys(self, blocks: Tensor) -> Tensor:
        """[num_blocks, Hkv, D, block_size]"""
        return self._view(blocks, self._keys_start, (self.key_dim, self.block_size), self.format.dtype)

    def _values(self, blocks: Tensor) -> Tensor:
        """[num_blocks, Hkv, block_size, Dv]"""
        shape = (self.block_size, self._padded_value_dim)
        return self._view(blocks, self._values_start, shape, self.format.dtype)[..., : self.value_dim]


def _quantize(x: Tensor, format: KVFormat) -> tuple[Tensor, Tensor]:
    """[T, Hkv, size] float32 -> numbers to be stored (float32), scales [T, Hkv]"""
    assert format.largest is not None
    peaks = x.abs().amax(dim=-1)
    inverse = torch.where(peaks >= _SMALLEST_PEAK, torch.full_like(peaks, format.largest) / peaks, 0.0)
    scaled = x * inverse[..., None]
    return scaled.round() if format is KVFormat.INT8 else scaled, peaks / format.largest
