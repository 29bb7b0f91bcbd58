"""GGUF blocks against the `gguf` package, which is the reference that ggml itself publishes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from compression.gguf import dequantize
from registry.errors import CheckpointError, UnsupportedModelError
from registry.ggml_types import GGML_TYPES, SUPPORTED_GGML_TYPES

_TYPES = {kind.name: kind for kind in GGML_TYPES.values()}


def _reference(blocks: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[dtype])


def _same_bits(ours: torch.Tensor, reference: np.ndarray) -> bool:
    mine = ours.numpy()
    both_nan = np.isnan(mine) & np.isnan(reference)
    return bool(np.all((mine.view(np.uint32) == np.ascontiguousarray(reference).view(np.uint32)) | both_nan))


@pytest.mark.parametrize("dtype", sorted(SUPPORTED_GGML_TYPES))
def test_random_bytes_give_the_reference_bit_for_bit(dtype: str) -> None:
    kind = _TYPES[dtype]
    rows, columns = 37, 256 * 9
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (rows, columns // kind.block_size * kind.block_bytes), dtype=np.uint8)
    ours = dequantize(blocks, dtype, (rows, columns))
    assert ours.shape == (rows, columns)
    assert ours.dtype == torch.float32
    assert _same_bits(ours, _reference(blocks, dtype).reshape(rows, columns))


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("scale", [0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00])
def test_edge_scales(dtype: str, scale: int) -> None:
    """Zeros, denormals, the largest numbers, infinities and NaN as block scales, with all-zero and all-one integers."""
    kind = _TYPES[dtype]
    blocks = np.stack([np.full(kind.block_bytes, fill, np.uint8) for fill in (0x00, 0xFF, 0x5A)])
    at = kind.block_bytes - 2 if dtype == "Q6_K" else 0
    blocks[:, at : at + 2] = np.frombuffer(np.uint16(scale).tobytes(), np.uint8)
    ours = dequantize(blocks, dtype, (3, kind.block_size))
    assert _same_bits(ours, _reference(blocks, dtype))


def test_quantized_numbers_come_back_close() -> None:
    weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    for dtype, tolerance in (("Q8_0", 0.02), ("Q4_1", 0.3), ("BF16", 0.02), ("F16", 0.002), ("F32", 0.0)):
        packed = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[dtype])
        data = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
        assert np.abs(dequantize(data, dtype, weights.shape).numpy() - weights).max() <= tolerance


def test_more_weights_than_one_chunk_and_a_read_only_buffer() -> None:
    data = np.random.default_rng(1).integers(0, 256, (3000, 6 * 20), dtype=np.uint8)
    assert _same_bits(dequantize(data.tobytes(), "Q4_1", (3000, 192)), _reference(data, "Q4_1"))


def test_result_owns_its_memory() -> None:
    data = bytearray(np.arange(4, dtype=np.float32).tobytes())
    out = dequantize(memoryview(data), "F32", (2, 2))
    data[:] = bytes(16)
    assert out.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="IQ2_XS"):
        dequantize(b"", "IQ2_XS", (0,))
    with pytest.raises(CheckpointError, match="truncated"):
        dequantize(bytes(19), "Q4_1", (32,))
    with pytest.raises(CheckpointError, match="multiple of 32"):
        dequantize(bytes(20), "Q4_1", (40,))
