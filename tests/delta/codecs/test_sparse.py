from __future__ import annotations

import pytest
import torch

from delta.codecs.sparse import SPARSE, encode_sparse
from delta.same_bits import same_bits


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
def test_exact(base_dtype: torch.dtype, target_dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(1)
    base = torch.randn(30, 40).to(base_dtype)
    changed = torch.rand(30, 40) < 0.05
    target = (base.float() + torch.randn(30, 40) * size * changed).to(target_dtype)
    term = encode_sparse(base, target)
    if term is None:  # no float32 difference gives all bits back; seldom
        assert (base_dtype, target_dtype) == (torch.float32, torch.float32)
        return
    SPARSE.check(term.parts, (30, 40))
    weight = base.float().clone()
    SPARSE.add_to(weight, term.parts)
    assert same_bits(weight.to(target_dtype), target)


def test_only_what_changed_is_stored() -> None:
    base = torch.zeros(4, 10).bfloat16()
    target = base.clone()
    target[1, 3], target[1, 7], target[3, 0] = 1, 2, 3
    term = encode_sparse(base, target)
    assert term is not None
    assert {name: part.tolist() for name, part in term.parts.items()} == {
        "row_counts": [0, 2, 0, 1],
        "columns": [3, 7, 0],
        "values": [1, 2, 3],
    }
    assert term.parts["values"].dtype == torch.bfloat16
    matrix = SPARSE.terms(term.parts, (4, 10)).sparse
    assert matrix is not None
    assert matrix.row_starts.tolist() == [0, 0, 2, 2, 3]
    assert (matrix.row_starts.dtype, matrix.columns.dtype) == (torch.int64, torch.int32)


def test_wide_matrices_have_wider_columns() -> None:
    target = torch.zeros(1, 32_769)
    target[0, 32_768] = 1
    term = encode_sparse(torch.zeros(1, 32_769), target)
    assert term is not None
    assert term.parts["columns"].dtype == torch.int32
    SPARSE.check(term.parts, (1, 32_769))


@pytest.mark.parametrize("value", [-0.0, float("nan"), float("inf")])
def test_what_no_difference_gives_back_is_left_to_others(value: float) -> None:
    target = torch.zeros(2, 3)
    target[1, 1] = value
    assert encode_sparse(torch.zeros(2, 3), target) is None
    assert encode_sparse(torch.zeros(2, 3, dtype=torch.int64), target) is None


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("row_counts", [3, -1], "below 0"),
        ("columns", [0, 9], "0 to 8"),
        ("columns", [0, -1], "0 to 8"),
        ("columns", [4, 4], "ascending"),
        ("columns", [4, 3], "ascending"),
    ],
)
def test_places_that_cannot_be(part: str, values: list[int], message: str) -> None:
    base = torch.zeros(2, 9)
    term = encode_sparse(base, torch.eye(1, 9).expand(2, 9).roll(3, 0) * torch.tensor([[1.0], [0]]) + _second())
    assert term is not None
    parts = {**term.parts, part: torch.tensor(values, dtype=term.parts[part].dtype)}
    with pytest.raises(ValueError, match=message):
        SPARSE.check(parts, (2, 9))


def _second() -> torch.Tensor:
    matrix = torch.zeros(2, 9)
    matrix[0, 5] = 1
    return matrix
