"""What goes through the slots comes out as it was, in order, whatever the sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from compression.grouped_weight import GroupedWeight
from compression.int8 import quantize_int8
from model_worker.engine.staged_weights import Weight, stage_weights

CPU = torch.device("cpu")


def _weights() -> list[tuple[str, Weight]]:
    torch.manual_seed(0)
    sizes = [(1,), (3, 40), (0,), (200, 7), (5,), (64, 64), (2, 3, 4)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    found: list[tuple[str, Weight]] = [
        (f"tensor {i}", torch.randn(size).to(dtypes[i % 3])) for i, size in enumerate(sizes)
    ]
    found.insert(3, ("transposed", torch.randn(30, 20).t()))
    found.insert(4, ("columns", torch.randn(20, 30)[:, 10:20]))
    found.insert(5, ("columns of each", torch.randn(3, 4, 30).to(torch.bfloat16)[..., :15]))
    found.insert(5, ("blocks", quantize_int8(torch.randn(4, 32))))
    return found


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(1, 64), (3, 100), (16, 2**20), (2, 1)])
def test_weights_come_out_as_they_were(num_slots: int, slot_bytes: int) -> None:
    weights = _weights()
    slot_bytes = max(slot_bytes, 4)
    staged = list(stage_weights(weights, CPU, num_slots=num_slots, slot_bytes=slot_bytes))
    assert [name for name, _ in staged] == [name for name, _ in weights]
    for (_, found), (_, expected) in zip(staged, weights, strict=True):
        if isinstance(expected, GroupedWeight):
            assert found is expected
        else:
            assert isinstance(found, torch.Tensor)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
            assert found.is_contiguous()


def test_it_reads_ahead_no_further_than_the_slots() -> None:
    asked = 0

    def weights() -> Iterator[tuple[str, Weight]]:
        nonlocal asked
        for i in range(20):
            asked += 1
            yield str(i), torch.full((16,), float(i))

    staged = stage_weights(weights(), CPU, num_slots=4, slot_bytes=64)
    for i in range(10):
        name, tensor = next(staged)
        assert name == str(i)
        assert isinstance(tensor, torch.Tensor)
        assert bool((tensor == i).all())
        assert asked <= i + 1 + 4


def test_errors_of_the_files_come_through() -> None:
    def weights() -> Iterator[tuple[str, Weight]]:
        yield "first", torch.ones(3)
        raise OSError("the disk has gone")

    with pytest.raises(OSError, match="the disk"):
        list(stage_weights(weights(), CPU))
