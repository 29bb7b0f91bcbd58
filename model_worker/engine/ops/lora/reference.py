"""In torch, what a variant's terms make of the rows of a linear layer; see the package's docstring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model_worker.engine.ops.cpu.program import Step
from model_worker.engine.ops.cpu.step_variants import UNIT, PackedLinear, PackedVariant, StepVariants
from model_worker.engine.ops.sign_planes import reference as sign_planes
from model_worker.engine.ops.sparse_matrix import reference as sparse_matrix


class VariantRows(NamedTuple):
    """Rows of an operation.

    Attributes:
        tokens: [T] the step's row of each.
        t: [T, ranks] what `Shrink` left for each.
    """

    variants: StepVariants
    tokens: Tensor
    t: Tensor

    @classmethod
    def of(cls, step: Step, tokens: Tensor | None = None, rows: slice | None = None) -> VariantRows | None:
        """All rows of a step, or some of those for which `tokens` names the step's rows; None: no row has a variant."""
        if step.variants is None:
            return None
        tokens = torch.arange(step.num_rows) if tokens is None else tokens
        rows = slice(0, len(tokens)) if rows is None else rows
        return cls(step.variants, tokens[rows], step.variants.t[rows])

    def runs(self) -> Iterator[tuple[PackedVariant, Tensor]]:
        """Each variant with its rows [T] bool."""
        for start, end, variant in self.variants.segments:
            yield variant, (self.tokens >= start) & (self.tokens < end)


def unpack_a(terms: PackedLinear, num_inputs: int) -> Tensor:
    """-> [r, K] float32"""
    assert terms.a is not None
    return _in_order(terms.a).view(terms.rank, -1)[:, :num_inputs].float()


def unpack_b(terms: PackedLinear) -> Tensor:
    """-> [N padded, r] float32"""
    assert terms.b is not None
    assert terms.units is not None
    b = torch.zeros(len(terms.units) * UNIT, terms.rank)
    for unit, (offset, first, ranks) in enumerate(terms.units.tolist()):
        stored = ranks + ranks % 2 if terms.b.dtype == torch.bfloat16 else ranks
        part = _in_order(terms.b[offset : offset + stored * UNIT]).view(stored, UNIT)[:ranks]
        b[unit * UNIT : (unit + 1) * UNIT, first : first + ranks] = part.T.float()
    return b


def _in_order(stored: Tensor) -> Tensor:
    """What `interleave_pairs` has interleaved."""
    return stored.view(-1, UNIT, 2).transpose(1, 2).flatten() if stored.dtype == torch.bfloat16 else stored


def shrink(x: Tensor, rows: VariantRows, index: int) -> None:
    """See `Shrink`. x [T, K]"""
    for variant, mine in rows.runs():
        terms = variant.linears.get(index)
        if terms is None:
            continue
        if terms.input_scale is not None:
            x[mine] *= terms.input_scale
        elif terms.a is not None:
            rows.t[mine, : terms.rank] = x[mine] @ unpack_a(terms, x.shape[1]).T


def add_terms(y: Tensor, x: Tensor, rows: VariantRows, index: int) -> None:
    """y [T, N] is the base's product of x [T, K], and becomes the variant's; without the base's bias."""
    num_outputs = y.shape[1]
    for variant, mine in rows.runs():
        terms = variant.linears.get(index)
        if terms is None:
            continue
        changed = y[mine]
        if terms.output_scale is not None:
            changed *= terms.output_scale[:num_outputs]
        if terms.b is not None:
            changed += rows.t[mine, : terms.rank] @ unpack_b(terms).T[:, :num_outputs]
        if terms.bias is not None:
            changed += terms.bias[:num_outputs]
        if terms.signs is not None:
            changed += x[mine] @ sign_planes.unpack(terms.signs, x.shape[1]).T[:, :num_outputs]
        if terms.sparse is not None:
            changed += x[mine] @ sparse_matrix.unpack(terms.sparse, x.shape[1]).T[:, :num_outputs]
        if terms.dense is not None:
            changed += x[mine] @ terms.dense.float().transpose(1, 2).flatten(0, 1).T[:, :num_outputs]
        y[mine] = changed
