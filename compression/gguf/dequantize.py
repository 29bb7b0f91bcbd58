"""GGUF blocks to float32, exactly as the format defines them.

With d, m the block's float16 scale and offset and q its unsigned integers, in float32 arithmetic in this order:

    Q8_0  w = d·q          (q signed)          Q4_K, Q5_K  w = (d·s)·q - (m·t)   s, t: 6-bit scale, offset of 32 weights
    Q4_0  w = d·(q - 8)                        Q6_K        w = (d·s)·(q - 32)    s: signed 8-bit scale of 16 weights
    Q4_1  w = d·q + m

Source: docs/formats/gguf.md; ggml's `ggml-quants.c`, whose results are reproduced bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from registry.errors import CheckpointError, UnsupportedModelError
from registry.ggml_types import GGML_TYPES, GgmlType

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

# Weights unpacked at a time: temporary arrays stay in the CPU's cache.
_WEIGHTS_PER_CHUNK = 1 << 17


def dequantize(data: memoryview | bytes | npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Unpack one tensor.

    Args:
        data: its bytes, exactly as many as `dtype` and `shape` say.
        dtype: GGUF type name, such as "Q4_1".
        shape: row-major, the last dimension is contiguous in the file.

    Returns:
        float32 tensor of `shape` with memory of its own.

    Raises:
        UnsupportedModelError: a type that is not read.
        CheckpointError: a length that contradicts the shape.
    """
    kind = _find_type(dtype)
    blocks = split_blocks(data, kind, shape)
    out = np.empty((len(blocks), kind.block_size), np.float32)
    unpack = _UNPACK[dtype]
    step = max(1, _WEIGHTS_PER_CHUNK // kind.block_size)
    # Infinite and NaN scales follow IEEE rules, as they do in the reference.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            unpack(blocks[start : start + step], out[start : start + step])
    return torch.from_numpy(out).reshape(shape)


def split_blocks(
    data: memoryview | bytes | npt.NDArray[np.uint8], kind: GgmlType, shape: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """The bytes of one tensor as [num_blocks, block_bytes], still in `data`.

    Raises:
        CheckpointError: a length that contradicts the shape.
    """
    if shape and shape[-1] % kind.block_size:
        raise CheckpointError(
            f"a {kind.name} tensor of shape {list(shape)} is impossible: its rows are not a multiple of "
            f"{kind.block_size} long. The file is damaged; fetch it again"
        )
    expected = math.prod(shape) // kind.block_size * kind.block_bytes
    blocks = np.frombuffer(data, dtype=np.uint8)
    if blocks.size != expected:
        raise CheckpointError(
            f"a {kind.name} tensor of shape {list(shape)} takes {expected} bytes, but {blocks.size} are there. "
            "The file is truncated or damaged; fetch it again"
        )
    return blocks.reshape(-1, kind.block_bytes)


def unpack_nibbles(packed: Bytes, out: Any) -> None:
    """[..., n] bytes -> [..., 2, n]: all low nibbles, then all high ones."""
    out[..., 0, :] = packed & 0x0F
    out[..., 1, :] = packed >> 4


def _find_type(name: str) -> GgmlType:
    if name not in _UNPACK:
        raise UnsupportedModelError(
            f"GGUF tensor type {name} is not supported (supported: {', '.join(_UNPACK)}). "
            "Use another quantization of the model, or its safetensors release"
        )
    return next(kind for kind in GGML_TYPES.values() if kind.name == name)


def _halves(column: Bytes) -> Floats:
    """[n, 2k] bytes -> [n, k]."""
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


def _unpack_f32(blocks: Bytes, out: Floats) -> None:
    out[:] = np.ascontiguousarray(blocks).view("<f4")


def _unpack_f16(blocks: Bytes, out: Floats) -> None:
    out[:] = _halves(blocks)


def _unpack_bf16(blocks: Bytes, out: Floats) -> None:
    # bfloat16 is the upper half of a float32.
    out.view(np.uint32)[:] = np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16


def _unpack_q8_0(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _halves(blocks[:, :2])


def _unpack_q4_0(blocks: Bytes, out: Floats) -> None:
    unpack_nibbles(blocks[:, 2:], out.reshape(-1, 2, 16))
    out -= 8
    out *= _halves(blocks[:, :2])


def _unpack_q4_1(blocks: Bytes, out: Floats) -> None:
    unpack_nibbles(blocks[:, 4:], out.reshape(-1, 2, 16))
    out *= _halves(blocks[:, :2])
    out += _halves(blocks[:, 2:4])


def _scale_and_offset(blocks: Bytes, out: Floats) -> None:
    """Turn the integers in `out` into weights with the header that Q4_K and Q5_K share (bytes 0 to 15)."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    low_scale, low_offset, high = packed[:, 0], packed[:, 1], packed[:, 2]  # each [n, 4]
    scale = np.concatenate([low_scale & 0x3F, (high & 0x0F) | (low_scale >> 2 & 0x30)], axis=1)  # [n, 8]
    offset = np.concatenate([low_offset & 0x3F, (high >> 4) | (low_offset >> 2 & 0x30)], axis=1)  # [n, 8]
    groups = out.reshape(-1, 8, 32)
    groups *= (_halves(blocks[:, :2]) * scale.astype(np.float32))[:, :, None]
    groups -= (_halves(blocks[:, 2:4]) * offset.astype(np.float32))[:, :, None]


def _unpack_q4_k(blocks: Bytes, out: Floats) -> None:
    unpack_nibbles(blocks[:, 16:].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32))
    _scale_and_offset(blocks, out)


def _unpack_q5_k(blocks: Bytes, out: Floats) -> None:
    groups = out.reshape(-1, 8, 32)
    unpack_nibbles(blocks[:, 48:].reshape(-1, 4, 32), out.reshape(-1, 4, 2, 32))
    fifth_bits = blocks[:, 16:48]  # bit g of byte i belongs to weight i of group g
    for group in range(8):
        groups[:, group] += (fifth_bits >> group & 1) << 4
    _scale_and_offset(blocks, out)


def _unpack_q6_k(blocks: Bytes, out: Floats) -> None:
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 32)
    quarters = out.reshape(-1, 2, 4, 32)  # two halves of 128 weights, each of four runs of 32
    unpack_nibbles(low, out.reshape(-1, 2, 2, 64))
    for quarter in range(4):
        quarters[:, :, quarter] += (high >> 2 * quarter & 3) << 4
    out -= 32
    groups = out.reshape(-1, 16, 16)
    groups *= (_halves(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32))[:, :, None]


_UNPACK: Mapping[str, Callable[[Bytes, Floats], None]] = {
    "F32": _unpack_f32,
    "F16": _unpack_f16,
    "BF16": _unpack_bf16,
    "Q8_0": _unpack_q8_0,
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
}
