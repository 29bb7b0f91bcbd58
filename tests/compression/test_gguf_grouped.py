"""Blocks that stay as they are mean the same numbers, bit for bit, as when they are dequantized."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from compression.gguf import GROUPED_TYPES, dequantize, read_grouped
from registry.errors import CheckpointError
from registry.ggml_types import GGML_TYPES, SUPPORTED_GGML_TYPES

_BLOCK_BYTES = {kind.name: kind.block_bytes for kind in GGML_TYPES.values()}


def _random_blocks(dtype: str, num_blocks: int) -> np.ndarray:
    """Random bytes with finite scales and offsets; for Q4_0 scales that times 8 are finite."""
    blocks = np.random.default_rng(3).integers(0, 256, (num_blocks, _BLOCK_BYTES[dtype]), dtype=np.uint8)
    for high_byte in (1, 3) if dtype == "Q4_1" else (1,):
        blocks[:, high_byte] &= 0xEB if dtype == "Q4_0" else 0xFB
    return blocks


@pytest.mark.parametrize("dtype", sorted(GROUPED_TYPES))
def test_random_blocks_mean_the_same_numbers(dtype: str) -> None:
    rows, columns = 37, 32 * 50
    blocks = _random_blocks(dtype, rows * 50)
    grouped = read_grouped(blocks, dtype, (rows, columns))
    assert grouped is not None
    assert grouped.shape == (rows, columns)
    assert grouped.scales.shape == (rows, 50)
    expected = dequantize(blocks, dtype, (rows, columns))
    ours = grouped.dequantize()
    assert torch.equal(ours, expected)
    signs_may_differ = (ours == 0) & (dtype == "Q4_0")
    assert torch.equal(ours.view(torch.int32)[~signs_may_differ], expected.view(torch.int32)[~signs_may_differ])


@pytest.mark.parametrize("dtype", sorted(GROUPED_TYPES))
def test_blocks_that_the_gguf_package_wrote(dtype: str) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[dtype]
    blocks = gguf.quants.quantize(weight, kind)
    grouped = read_grouped(blocks.reshape(-1).view(np.uint8), dtype, weight.shape)
    assert grouped is not None
    assert (grouped.minimums is None) == (dtype == "Q8_0")
    assert np.array_equal(grouped.dequantize().numpy(), gguf.quants.dequantize(blocks, kind))


def test_the_result_owns_its_memory() -> None:
    data = bytearray(_random_blocks("Q8_0", 2).tobytes())
    grouped = read_grouped(memoryview(data), "Q8_0", (2, 32))
    assert grouped is not None
    before = grouped.dequantize()
    data[:] = bytes(len(data))
    assert torch.equal(grouped.dequantize(), before)


@pytest.mark.parametrize("scale", [8192.0, -8192.0, 65504.0])
def test_a_q4_0_scale_whose_minimum_float16_cannot_hold_has_no_such_form(scale: float) -> None:
    blocks = _random_blocks("Q4_0", 4)
    blocks[2, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    assert read_grouped(blocks, "Q4_0", (4, 32)) is None
    blocks[2, :2] = np.frombuffer(np.float16(8188.0).tobytes(), np.uint8)
    assert read_grouped(blocks, "Q4_0", (4, 32)) is not None


@pytest.mark.parametrize(("dtype", "offset"), [("Q8_0", 0), ("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2)])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scales_that_are_no_numbers_are_refused(dtype: str, offset: int, value: float) -> None:
    blocks = _random_blocks(dtype, 4)
    blocks[2, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    with pytest.raises(CheckpointError, match="infinite or NaN"):
        read_grouped(blocks, dtype, (4, 32))


@pytest.mark.parametrize("dtype", sorted(SUPPORTED_GGML_TYPES - GROUPED_TYPES))
def test_other_types_have_no_such_form(dtype: str) -> None:
    assert read_grouped(b"", dtype, (0, 256)) is None


def test_vectors_have_no_such_form() -> None:
    assert read_grouped(_random_blocks("Q8_0", 1), "Q8_0", (32,)) is None


def test_a_length_that_contradicts_the_shape() -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        read_grouped(bytes(19), "Q4_1", (1, 32))
