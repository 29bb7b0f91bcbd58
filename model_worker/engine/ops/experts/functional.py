"""A mixture of experts over plain torch tensors, on GPUs and as a reference; the package's docstring has the formulas.

    select_experts(logits, k)         SelectExperts     ──► choices, weights [T, k]
    group_by_expert(choices, E)       GroupByExpert     ──► ExpertGroups
    expert_linear(x, W, groups)       ExpertLinear, after GatherRows where x has the step's rows
    combine_experts(y, ..., weights)  CombineExperts    ──► [T, size]

    logits [T, E], x [T, K] or [T k, K], W [E, N, K], y [T k, size], of one dtype: bfloat16, float16 or float32
    choices [T, k] int32; weights [T, k] float32

Softmax, products and the last sum are float32; what goes from one function to the next is rounded to the dtype of x.
On GPUs nothing is read by the host, and grids depend on T, k and E only, so that all of it can be captured in a graph:
how many rows an expert has is known to the device alone, and programs that find no rows for them leave. Of experts that
nobody chose no weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.experts.reference import (
    combine_experts_reference,
    expert_linear_reference,
    group_reference,
    select_reference,
)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertGroups:
    """The T k pairs of a token and an expert that it chose, sorted by expert and then by token.

    Attributes:
        starts: [E + 1] int32; the pairs of expert e are at [starts[e], starts[e + 1]).
        tokens: [T k] int32, of each pair.
        places: [T, k] int32, where the pair of each choice is.
    """

    starts: Tensor
    tokens: Tensor
    places: Tensor

    @property
    def num_experts(self) -> int:
        return len(self.starts) - 1


def select_experts(logits: Tensor, num_chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The choices of each row, and their weights; what is no number is chosen as if it were 0.

    Args:
        normalize: a row's weights sum to 1.
    """
    assert logits.is_contiguous()
    assert 1 <= num_chosen <= logits.shape[1]
    if logits.device.type == "cuda":
        from model_worker.engine.ops.experts import triton  # not installed where there is no GPU

        return triton.select_experts(logits, num_chosen, normalize=normalize)
    return select_reference(logits, num_chosen, normalize=normalize)


def group_by_expert(choices: Tensor, num_experts: int) -> ExpertGroups:
    """See the module's docstring."""
    assert choices.is_contiguous()
    if choices.device.type == "cuda":
        from model_worker.engine.ops.experts import triton

        return ExpertGroups(*triton.group_by_expert(choices, num_experts))
    starts, tokens, places = group_reference(choices, num_experts)
    return ExpertGroups(starts.int(), tokens.int(), places.int())


def expert_linear(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gathers: bool = False) -> Tensor:
    """-> [T k, N], in the order of the groups.

    Args:
        gathers: x has the step's rows; else one for each pair, in the order of the groups.
    """
    assert x.dtype == weight.dtype
    assert x.shape[1] == weight.shape[2]
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert groups.num_experts == len(weight)
    assert len(x) == (len(groups.places) if gathers else len(groups.tokens))
    if x.device.type == "cuda":
        from model_worker.engine.ops.experts import triton

        return triton.expert_linear(x, weight, groups.starts, groups.tokens, gathers=gathers)
    rows = x[groups.tokens.long()] if gathers else x
    return expert_linear_reference(rows, weight, groups.starts)


def combine_experts(y: Tensor, groups: ExpertGroups, weights: Tensor) -> Tensor:
    """-> [T, size]"""
    assert y.is_contiguous()
    assert weights.is_contiguous()
    assert weights.shape == groups.places.shape
    assert weights.dtype == torch.float32
    if y.device.type == "cuda":
        from model_worker.engine.ops.experts import triton

        return triton.combine_experts(y, groups.places, weights)
    return combine_experts_reference(y, groups.places, weights)
