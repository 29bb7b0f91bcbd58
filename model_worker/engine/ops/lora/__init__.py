"""Low-rank adapters and other terms of variants: what they change in the rows that use them.

    y = e ∘ ((d ∘ x) W^T) + t B^T + c + x Z^T + ...,   t = x A^T   for each row of a segment, with its variant's terms

Two operations compute it. All layers use the step's one plan of segments (`StepVariants`).

    Shrink          t[row] = x[row] A^T, at the variant's own rank; where it has d: x[row] = d ∘ x[row] in place
    Linear, ExpertLinear    the rest, in the tiles of the base's product, before bias, activation, alpha and residual

        x       [T, K] float32; A [r, K], Z float32 or bfloat16; e, c [N], d [K] float32
        B       in units of 16 outputs, [unit][ranks of the unit][16]. A fused layer (q|k|v, gate|up) has the ranks of
                its parts one after the other; a unit names the first that its outputs have, and how many they are.
        d       stands alone, and only where nobody else reads x.
        ...     sign planes (ops/sign_planes), and Z by its numbers that are not 0 (ops/sparse_matrix)

    AddEmbedding    out[row] = multiplier * its replacement, where the token has one
                    or else out[row] += multiplier * that row of its sign planes
                    out[row] += multiplier * A[token] B, where the base has the token; one that it has not is replaced

        out     [T, H] float32, what `Embedding` made of the base;  A [V, r], B [r, H]

Every number is summed in an order of its own: a row's bits depend neither on other rows nor on how many there are,
except as ops/sign_planes says.
Source: Hu et al., arXiv 2106.09685; segments of a batch: Punica, arXiv 2310.18547, S-LoRA, arXiv 2311.03285.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

from model_worker.engine.ops.cpu.program import Step, address, row_stride
from model_worker.engine.ops.lora import reference
from model_worker.engine.ops.sign_planes.reference import unpack as unpack_signs

__all__ = ["AddEmbedding", "ExpertRows", "Shrink"]


class _ShrinkArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("index", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """Rows in the order of experts, as in `ExpertPlan`.

    Attributes:
        starts: [num_experts + 1] int64
        tokens: [T * k] int32
    """

    starts: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Shrink:
    """See the package's docstring.

    Attributes:
        x: [T, K], the input of a linear layer.
        index: of its terms in a variant's table; of experts the first one's, where the others follow.
        experts: None: the rows are the step's.
    """

    name: str
    x: Tensor
    index: int
    experts: ExpertRows | None = None

    @property
    def kernel(self) -> str:
        return "rootgraft_shrink" if self.experts is None else "rootgraft_expert_shrink"

    def arguments(self) -> ctypes.Structure:
        starts, tokens = (None, None) if self.experts is None else (self.experts.starts, self.experts.tokens)
        return _ShrinkArgs(
            address(self.x),
            row_stride(self.x),
            self.x.shape[1],
            self.index,
            address(starts),
            address(tokens),
            0 if starts is None else len(starts) - 1,
        )

    def reference(self, step: Step) -> None:
        if self.experts is None:
            rows = reference.VariantRows.of(step)
            if rows is not None:
                reference.shrink(self.x[: step.num_rows], rows, self.index)
            return
        for expert in range(len(self.experts.starts) - 1):
            of_expert = slice(*self.experts.starts[expert : expert + 2].tolist())
            rows = reference.VariantRows.of(step, self.experts.tokens, of_expert)
            if rows is not None:
                reference.shrink(self.x[of_expert], rows, self.index + expert)

    def bytes_moved(self, step: Step) -> int:
        """Of A: those of experts as if each were read."""
        if step.variants is None:
            return 0
        tables = (variant.linears for _, _, variant in step.variants.segments)
        matrices = (table[index].a for table in tables for index in self._indices() if index in table)
        return sum(a.nbytes for a in matrices if a is not None)

    def flops(self, step: Step) -> int:
        return 0

    def _indices(self) -> range:
        return range(self.index, self.index + (1 if self.experts is None else len(self.experts.starts) - 1))


class _AddEmbeddingArgs(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("multiplier", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class AddEmbedding:
    """See the package's docstring."""

    name: str
    out: Tensor
    multiplier: float = 1.0
    kernel: str = "rootgraft_add_embedding"

    def arguments(self) -> ctypes.Structure:
        return _AddEmbeddingArgs(address(self.out), row_stride(self.out), self.out.shape[1], self.multiplier)

    def reference(self, step: Step) -> None:
        if step.variants is None:
            return
        for start, end, variant in step.variants.segments:
            terms = variant.embedding
            if terms is None:
                continue
            tokens, out = step.input_ids[start:end], self.out[start:end]
            known = tokens < terms.num_rows
            if terms.signs is not None:
                out[known] += unpack_signs(terms.signs, out.shape[1])[tokens[known]] * self.multiplier
            if terms.token_ids is not None and terms.rows is not None:
                for token, row in zip(terms.token_ids.tolist(), terms.rows, strict=True):
                    out[tokens == token] = row.float() * self.multiplier
            if terms.a is not None and terms.b is not None:
                out[known] += terms.a[tokens[known]].float() @ terms.b.float() * self.multiplier

    def bytes_moved(self, step: Step) -> int:
        return 0 if step.variants is None else 4 * step.num_rows * self.out.shape[1]

    def flops(self, step: Step) -> int:
        return 0
