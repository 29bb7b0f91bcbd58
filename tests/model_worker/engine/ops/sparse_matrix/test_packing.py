"""Packed sparse matrices are those that were packed. What the kernels make of them: tests of ops/sign_planes."""

from __future__ import annotations

import pytest
import torch

from delta.merge_terms import sparse_to_dense
from model_worker.engine.ops.linear.packed_weight import interleave_gated
from model_worker.engine.ops.sparse_matrix.packing import SparsePart, pack_sparse
from model_worker.engine.ops.sparse_matrix.reference import unpack
from tests.fakes.random_terms import random_sparse


@pytest.mark.parametrize(
    ("sizes", "gated"),
    [((64, 32, 32), False), ((20, 7, 9), False), ((100,), False), ((100,), True), ((13, 13), True)],
)
def test_packed_matrices(sizes: tuple[int, ...], gated: bool) -> None:
    torch.manual_seed(0)
    num_inputs = 45
    matrices = [random_sparse(size, num_inputs, share=0.1) for size in sizes[:-1]]
    last = random_sparse(sizes[-1], num_inputs, share=0.02) if len(sizes) < 3 else None
    parts = [SparsePart(size, matrix) for size, matrix in zip(sizes, [*matrices, last], strict=True)]
    packed = pack_sparse(parts, gated=gated, dtype=torch.float32)
    assert packed is not None
    dense = torch.cat(
        [
            torch.zeros(size, num_inputs) if matrix is None else sparse_to_dense(matrix, num_inputs)
            for size, matrix in parts
        ]
    )
    expected = interleave_gated(*dense.chunk(2)) if gated else dense
    found = unpack(packed, num_inputs)
    assert torch.equal(found[: len(expected)], expected)
    assert not found[len(expected) :].any()
    for start, end in zip(packed.starts[:-1], packed.starts[1:], strict=True):
        assert (packed.columns[start:end].diff(dim=0) >= 0).all()


def test_none_of_no_part() -> None:
    assert pack_sparse([SparsePart(16, None)], gated=False, dtype=torch.float32) is None
