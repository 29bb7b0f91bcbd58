"""A mixture of experts: who computes which token, and the sum of what they make of it.

    SelectExperts     experts[t] = those of the k largest of logits[t], in descending order; of equal ones the first
                      weights[t, i] = softmax(logits[t])[experts[t, i]], where asked divided by their sum
    GroupByExpert     the T k pairs (t, i), sorted by expert and then by token: pair (t, i) is at places[t, i],
                      tokens[places[t, i]] = t, and those of expert e are at [starts[e], starts[e + 1])
    GatherRows        rows[p] = x[tokens[p]]
    ExpertLinear      out[p] = W[e] rows[p] for the pairs p of each expert e; gated as `Linear` is
    CombineExperts    out[t] += alpha * sum over i of weights[t, i] * y[places[t, i]]

Every expert multiplies its own rows at once, so that a weight is read once however many tokens chose it, and the
weights of experts that nobody chose are not read. The operations here are those of CPUs; `functional.py` has the same
for GPUs. Source: Shazeer et al., arXiv 1701.06538; Mixtral, arXiv 2401.04088.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import Step, address, row_stride
from model_worker.engine.ops.experts.reference import group_reference, select_reference
from model_worker.engine.ops.linear import Activation, Linear, LinearArgs, PackedWeight, QuantizedRows
from model_worker.engine.ops.lora.reference import VariantRows

__all__ = ["CombineExperts", "ExpertLinear", "ExpertPlan", "GatherRows", "GroupByExpert", "SelectExperts"]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlan:
    """Buffers of the choice and the order; see the package's docstring.

    Attributes:
        experts: [T, k] int32
        weights: [T, k] float32
        starts: [num_experts + 1] int64
        tokens: [T * k] int32
        places: [T, k] int32
    """

    experts: Tensor
    weights: Tensor
    starts: Tensor
    tokens: Tensor
    places: Tensor

    @classmethod
    def allocate(cls, num_rows: int, num_experts: int, num_chosen: int) -> ExpertPlan:
        assert 1 <= num_chosen <= num_experts
        return cls(
            torch.zeros(num_rows, num_chosen, dtype=torch.int32),
            torch.zeros(num_rows, num_chosen),
            torch.zeros(num_experts + 1, dtype=torch.int64),
            torch.zeros(num_rows * num_chosen, dtype=torch.int32),
            torch.zeros(num_rows, num_chosen, dtype=torch.int32),
        )

    @property
    def num_experts(self) -> int:
        return len(self.starts) - 1

    @property
    def num_chosen(self) -> int:
        return self.experts.shape[1]


class _SelectArgs(ctypes.Structure):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("num_chosen", ctypes.c_int64),
        ("normalize", ctypes.c_int64),
        ("experts", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SelectExperts:
    """See the package's docstring. logits: [T, num_experts], contiguous."""

    name: str
    logits: Tensor
    plan: ExpertPlan
    normalize: bool
    kernel: str = "rootgraft_select_experts"

    def __post_init__(self) -> None:
        assert self.logits.shape[1] == self.plan.num_experts
        assert self.logits.is_contiguous()

    def arguments(self) -> ctypes.Structure:
        plan = self.plan
        return _SelectArgs(
            address(self.logits),
            plan.num_experts,
            plan.num_chosen,
            self.normalize,
            address(plan.experts),
            address(plan.weights),
        )

    def reference(self, step: Step) -> None:
        chosen = select_reference(self.logits[: step.num_rows], self.plan.num_chosen, normalize=self.normalize)
        self.plan.experts[: step.num_rows], self.plan.weights[: step.num_rows] = chosen

    def bytes_moved(self, step: Step) -> int:
        return step.num_rows * (4 * self.plan.num_experts + 8 * self.plan.num_chosen)

    def flops(self, step: Step) -> int:
        return 0


class _GroupArgs(ctypes.Structure):
    _fields_ = (
        ("experts", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("num_chosen", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class GroupByExpert:
    """See the package's docstring."""

    name: str
    plan: ExpertPlan
    kernel: str = "rootgraft_group_by_expert"

    def arguments(self) -> ctypes.Structure:
        plan = self.plan
        return _GroupArgs(
            address(plan.experts),
            plan.num_experts,
            plan.num_chosen,
            address(plan.starts),
            address(plan.tokens),
            address(plan.places),
        )

    def reference(self, step: Step) -> None:
        plan = self.plan
        starts, tokens, places = group_reference(plan.experts[: step.num_rows], plan.num_experts)
        plan.starts[:], plan.tokens[: len(tokens)], plan.places[: step.num_rows] = starts, tokens, places

    def bytes_moved(self, step: Step) -> int:
        return step.num_rows * self.plan.num_chosen * 12

    def flops(self, step: Step) -> int:
        return 0


class _GatherArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("num_chosen", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class GatherRows:
    """See the package's docstring. x: [T, size]; out: [T * k, size], contiguous."""

    name: str
    x: Tensor
    plan: ExpertPlan
    out: Tensor
    kernel: str = "rootgraft_gather_rows"

    def __post_init__(self) -> None:
        assert self.x.shape[1] == self.out.shape[1]
        assert self.out.is_contiguous()

    def arguments(self) -> ctypes.Structure:
        return _GatherArgs(
            address(self.x),
            row_stride(self.x),
            self.x.shape[1],
            self.plan.num_chosen,
            address(self.plan.tokens),
            address(self.out),
        )

    def reference(self, step: Step) -> None:
        num_pairs = step.num_rows * self.plan.num_chosen
        self.out[:num_pairs] = self.x[self.plan.tokens[:num_pairs].long()]

    def bytes_moved(self, step: Step) -> int:
        return 8 * step.num_rows * self.plan.num_chosen * self.x.shape[1]

    def flops(self, step: Step) -> int:
        return 0


class _ExpertLinearArgs(ctypes.Structure):
    _fields_ = (
        ("linear", LinearArgs),
        ("starts", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("expert_bytes", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLinear:
    """See the package's docstring.

    Attributes:
        x: [T * k, K], in the order of the plan.
        weight: [num_experts * N, K]: one expert's packed weight after the other; N is a multiple of 32.
        out: [T * k, N]; gated: [T * k, N / 2].
        quantized_x: as in `Linear`.
        terms: index of the first expert in a variant's table, where the others follow; None: no row has a variant.
    """

    name: str
    x: Tensor
    weight: PackedWeight
    out: Tensor
    plan: ExpertPlan
    activation: Activation = Activation.NONE
    quantized_x: QuantizedRows | None = None
    terms: int | None = None
    kernel: str = "rootgraft_expert_linear"

    def _of_expert(self, expert: int) -> Linear:
        """One expert's product over all rows."""
        num_bytes = self.weight.num_bytes // self.plan.num_experts
        weight = PackedWeight(
            self.weight.data[expert * num_bytes : (expert + 1) * num_bytes],
            self.weight.format,
            self.weight.num_outputs // self.plan.num_experts,
            self.weight.num_inputs,
        )
        return Linear(
            self.name,
            self.x,
            weight,
            self.out,
            activation=self.activation,
            quantized_x=self.quantized_x,
            terms=None if self.terms is None else self.terms + expert,
        )

    def arguments(self) -> ctypes.Structure:
        return _ExpertLinearArgs(
            self._of_expert(0).arguments(),
            address(self.plan.starts),
            self.plan.num_experts,
            self.weight.num_bytes // self.plan.num_experts,
            address(self.plan.tokens),
        )

    def reference(self, step: Step) -> None:
        for expert in range(self.plan.num_experts):
            rows = slice(*self.plan.starts[expert : expert + 2].tolist())
            if rows.start == rows.stop:
                continue
            linear = self._of_expert(expert)
            quantized = self.quantized_x
            if quantized is not None:
                quantized = QuantizedRows(quantized.values[rows], quantized.scales[rows], quantized.sums[rows])
            part = Linear(
                self.name,
                self.x[rows],
                linear.weight,
                self.out[rows],
                activation=self.activation,
                quantized_x=quantized,
                terms=linear.terms,
            )
            part.compute(rows.stop - rows.start, VariantRows.of(step, self.plan.tokens, rows))

    def read_bytes(self, step: Step) -> int:
        """Bytes of weights, of as many experts as can have been chosen at most."""
        num_pairs = step.num_rows * self.plan.num_chosen
        return min(num_pairs, self.plan.num_experts) * self.weight.num_bytes // self.plan.num_experts

    def bytes_moved(self, step: Step) -> int:
        num_pairs = step.num_rows * self.plan.num_chosen
        of_terms = 0
        if self.terms is not None and step.variants is not None:
            indices = range(self.terms, self.terms + self.plan.num_experts)
            of_terms = sum(step.variants.epilogue_bytes(index) for index in indices)
        return self.read_bytes(step) + of_terms + 4 * num_pairs * (self.x.shape[1] + self.out.shape[1])

    def flops(self, step: Step) -> int:
        num_outputs = self.weight.num_outputs // self.plan.num_experts
        return 2 * step.num_rows * self.plan.num_chosen * self.weight.num_inputs * num_outputs


class _CombineArgs(ctypes.Structure):
    _fields_ = (
        ("y", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("num_chosen", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("alpha", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class CombineExperts:
    """See the package's docstring. y: [T * k, size], contiguous; out: [T, size]."""

    name: str
    y: Tensor
    plan: ExpertPlan
    out: Tensor
    alpha: float = 1.0
    kernel: str = "rootgraft_combine_experts"

    def __post_init__(self) -> None:
        assert self.y.shape[1] == self.out.shape[1]
        assert self.y.is_contiguous()

    def arguments(self) -> ctypes.Structure:
        return _CombineArgs(
            address(self.y),
            self.y.shape[1],
            self.plan.num_chosen,
            address(self.plan.places),
            address(self.plan.weights),
            address(self.out),
            row_stride(self.out),
            self.alpha,
        )

    def reference(self, step: Step) -> None:
        places, weights = self.plan.places[: step.num_rows].long(), self.plan.weights[: step.num_rows]
        self.out[: step.num_rows] += (self.y[places] * weights[..., None]).sum(dim=1) * self.alpha

    def bytes_moved(self, step: Step) -> int:
        return 4 * step.num_rows * self.y.shape[1] * (self.plan.num_chosen + 2)

    def flops(self, step: Step) -> int:
        return 0
