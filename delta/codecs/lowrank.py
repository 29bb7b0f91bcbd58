"""`lowrank`: a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from delta.codecs.codec import Parts, Term
from delta.codecs.packed_bits import row_blocks
from delta.codecs.part_checks import check_finite, check_names, check_part
from delta.codecs.singular_components import singular_components
from delta.variant_terms import LinearTerms

_DAMPING = 0.01


class LowRank:
    """D = B A. A `DifferenceCodec`.

    Parts: a A [r, K] and b B [N, r], both bfloat16 or both float16; r ≥ 1.
    """

    name = "lowrank"

    def check(self, parts: Parts, shape: tuple[int, int]) -> None:
        check_names(parts, "a", "b")
        rank = len(parts["a"]) if parts["a"].ndim else 0
        if rank == 0:
            raise ValueError("a has no rows")
        a = check_part(parts, "a", (torch.bfloat16, torch.float16), (rank, shape[1]))
        check_part(parts, "b", (a.dtype,), (shape[0], rank))
        check_finite(parts, "a", "b")

    def add_to(self, weight: Tensor, parts: Parts) -> None:
        a = parts["a"].double()
        for rows in row_blocks(weight.shape):
            weight[rows] += (parts["b"][rows].double() @ a).float()

    def terms(self, parts: Parts, shape: tuple[int, int]) -> LinearTerms:
        return LinearTerms(a=parts["a"], b=parts["b"])


LOW_RANK = LowRank()


def encode_low_rank(difference: Tensor, rank: int, root: Tensor | None = None) -> Term:
    """B A of `rank`, at most min(N, K), that minimises ‖(D - B A) L‖, or without a root L ‖D - B A‖.

    difference [N, K] float32, root [K, K] as `input_root` makes it
    """
    if root is None:
        components = singular_components(difference, rank)
        return low_rank_term(components.a, components.b)
    components = singular_components(difference @ root, rank)
    return low_rank_term(torch.linalg.solve_triangular(root, components.a, upper=False, left=False), components.b)


def input_root(inputs: Sequence[Tensor]) -> Tensor:
    """L, lower triangular, with L Lᵀ = Σ x xᵀ / T + λ I over the T inputs x: ‖E L‖² is about what E adds to outputs.

    λ, a hundredth of the mean square of an input, stands for the inputs that are not among these.

    inputs: pieces [n, K] of any floating-point dtype. -> [K, K] float32

    Source: the whitening of SVD-LLM, arXiv 2403.07378, section 3.2, with λ.
    """
    num_columns = inputs[0].shape[1]
    moment = torch.zeros(num_columns, num_columns)
    for piece in inputs:
        moment.addmm_(piece.float().T, piece.float())
    moment /= sum(map(len, inputs))
    moment.diagonal().add_(_DAMPING * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    root: Tensor = torch.linalg.cholesky(moment.double())
    return root.float()


def low_rank_term(a: Tensor, b: Tensor) -> Term:
    """B A as it is stored: each component's size shared evenly between both factors. a [r, K], b [N, r] float32"""
    size_of_a, size_of_b = a.norm(dim=1), b.norm(dim=0)
    ratio = torch.where((size_of_a > 0) & (size_of_b > 0), (size_of_b / size_of_a).sqrt(), 1.0)
    return Term(LOW_RANK.name, {"a": (a * ratio[:, None]).bfloat16(), "b": (b / ratio).bfloat16().contiguous()})
