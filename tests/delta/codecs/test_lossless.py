from __future__ import annotations

import pytest
import torch
import zstandard
from torch import Tensor

from delta.codecs.lossless import LOSSLESS
from delta.same_bits import same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool]


@pytest.mark.parametrize("base_dtype", [*DTYPES, None])
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (6, 7), (2, 3, 4), (0, 3)])
def test_every_bit_comes_back(
    base_dtype: torch.dtype | None, target_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    base = None if base_dtype is None else (torch.randn(shape) * 3).to(base_dtype)
    target = (torch.randn(shape) * 3).to(target_dtype)
    parts = LOSSLESS.encode(base, target)
    LOSSLESS.check(parts, target_dtype, shape)
    assert same_bits(LOSSLESS.decode(base, parts, target_dtype, shape), target)


def test_values_that_equal_only_themselves() -> None:
    target = torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45])
    parts = LOSSLESS.encode(torch.zeros(4), target)
    assert same_bits(LOSSLESS.decode(torch.zeros(4), parts, torch.float32, (4,)), target)


def test_small_changes_are_small() -> None:
    torch.manual_seed(1)
    base = torch.randn(300, 400).bfloat16()
    target = torch.where(torch.rand(300, 400) < 0.01, base * 1.01, base)
    assert LOSSLESS.encode(base, target)["frame"].nbytes < target.nbytes / 15


def _frame(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_damaged_frames_are_refused() -> None:
    target = torch.randn(40)
    good = LOSSLESS.encode(None, target)["frame"].numpy().tobytes()
    larger = zstandard.compress(bytes(1 << 20))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(160))
    for content in (good[:3], larger, unsized, b"no frame at all......"):
        with pytest.raises(ValueError, match="frame"):
            LOSSLESS.check({"frame": _frame(content)}, torch.float32, (40,))
    flipped = bytearray(good)
    flipped[-10] ^= 1
    for content in (bytes(flipped), good[:-1]):
        with pytest.raises(ValueError, match="damaged"):
            LOSSLESS.decode(None, {"frame": _frame(content)}, torch.float32, (40,))
    for parts in (
        {},
        {"frame": torch.empty(0, dtype=torch.uint8)},
        {"frame": torch.zeros(4)},
        {"frame": torch.zeros(2, 2, dtype=torch.uint8)},
    ):
        with pytest.raises(ValueError, match="frame"):
            LOSSLESS.check(parts, torch.float32, (40,))
