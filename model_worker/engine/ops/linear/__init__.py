"""Linear layers of the native decoder: products with packed weights, and the quantization of their inputs.

    Linear          y = alpha * (x W^T + bias)                   out = y,  or  out += y
    gated           y = alpha * (x W^T + bias),  y = [gate, up]  out = activation(gate) * up
                    activation: silu(z) = z sigmoid(z), or gelu_tanh(z) = z sigmoid(1.5957691 (z + 0.044715 z^3))

        x     [T, K] float32, rows contiguous
        W     [N, K], packed (packed_weight.py)
        bias  [N] float32, in the order of the packed outputs
        out   [T, N] float32; gated: [T, N / 2]

    In rows of a variant, the terms that it has for this layer (ops/lora) change x W^T before all the rest.

    QuantizeRows    for each row and group of 32 inputs:  scale = max|x| / 127,  value = round(x / scale)
                    max|x| below 2^-120: value = 0; a group with NaN or an infinity has a scale that is NaN or infinite

Where the machine multiplies 8-bit integers (`MachineLevel.has_integer_dot`), int8 and int4 weights are multiplied by
quantized rows: each group's integer sum is exact, then scaled in float32. Elsewhere the weights are widened and the
rows stay float32. Scales per group of 32, not per row: one for a whole row loses 13 % of the most likely tokens of the
small model.

Source of the block formats and of integer products of blocks: ggml (Q8_0, Q4_1).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional as F

from compression.grouped_weight import GROUP
from model_worker.engine.ops.cpu.program import Step, address, row_stride
from model_worker.engine.ops.linear.packed_weight import (
    PANEL,
    PackedWeight,
    WeightFormat,
    interleave_gated,
    pack,
    separate_gated,
)
from model_worker.engine.ops.lora.reference import VariantRows, add_terms

__all__ = [
    "Activation",
    "Linear",
    "LinearArgs",
    "PackedWeight",
    "QuantizeRows",
    "QuantizedRows",
    "WeightFormat",
    "interleave_gated",
    "pack",
    "separate_gated",
]


_SMALLEST_PEAK = 2.0**-120  # as in quantize_rows.cpp


class Activation(IntEnum):
    """Of the gate of a gated pair; numbers as in cpu.cpp."""

    NONE = 0
    SILU = 1
    GELU_TANH = 2


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedRows:
    """Buffers for quantized rows.

    Attributes:
        values: [T, K padded to groups] int8.
        scales: [T, groups] float32.
        sums: [T, groups] int32, of the values.
    """

    values: Tensor
    scales: Tensor
    sums: Tensor

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1]

    @classmethod
    def allocate(cls, num_rows: int, num_inputs: int) -> QuantizedRows:
        num_groups = -(-num_inputs // GROUP)
        return cls(
            torch.zeros(num_rows, num_groups * GROUP, dtype=torch.int8),
            torch.zeros(num_rows, num_groups),
            torch.zeros(num_rows, num_groups, dtype=torch.int32),
        )


class _QuantizeArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("rows_per_token", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class QuantizeRows:
    """See the package's docstring.

    Attributes:
        x: [T, K]
        out: what is filled.
        rows_per_token: other than 1 where x has more rows than the step, as among experts.
    """

    name: str
    x: Tensor
    out: QuantizedRows
    rows_per_token: int = 1
    kernel: str = "rootgraft_quantize_rows"

    def __post_init__(self) -> None:
        assert self.out.num_groups == -(-self.x.shape[1] // GROUP)
        assert len(self.out.values) >= len(self.x)

    def arguments(self) -> ctypes.Structure:
        out = self.out
        return _QuantizeArgs(
            address(self.x),
            row_stride(self.x),
            self.x.shape[1],
            address(out.values),
            address(out.scales),
            address(out.sums),
            self.rows_per_token,
        )

    def reference(self, step: Step) -> None:
        num_rows, num_inputs = step.num_rows * self.rows_per_token, self.x.shape[1]
        groups = F.pad(self.x[:num_rows], (0, -num_inputs % GROUP)).view(num_rows, self.out.num_groups, GROUP)
        peaks = groups.abs().amax(dim=-1)
        inverse = torch.where(peaks >= _SMALLEST_PEAK, 127.0 / peaks, 0.0)
        values = torch.round(groups * inverse[..., None]).to(torch.int8)
        self.out.values[:num_rows] = values.flatten(1)
        self.out.scales[:num_rows] = peaks / 127.0
        self.out.sums[:num_rows] = values.sum(dim=-1, dtype=torch.int32)

    def bytes_moved(self, step: Step) -> int:
        return step.num_rows * self.rows_per_token * self.x.shape[1] * 5

    def flops(self, step: Step) -> int:
        return 0


class LinearArgs(ctypes.Structure):
    """Mirrored in cpu.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("format", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("num_inputs", ctypes.c_int64),
        ("num_outputs", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("accumulate", ctypes.c_int64),
        ("alpha", ctypes.c_float),
        ("quantized_x", ctypes.c_void_p),
        ("x_scales", ctypes.c_void_p),
        ("x_sums", ctypes.c_void_p),
        ("terms", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """See the package's docstring.

    Attributes:
        x: [T, K]
        weight: packed [N, K]; where `activation` is one, with outputs in the order of `interleave_gated`.
        out: [T, N], or [T, N / 2]
        bias: [N] float32 in the order of the packed outputs, or None.
        quantized_x: the rows of x quantized, for machines with integer products; None: x itself is used.
        accumulate: add to `out`.
        terms: index of this layer in a variant's table; None: no row has a variant.
    """

    name: str
    x: Tensor
    weight: PackedWeight
    out: Tensor
    bias: Tensor | None = None
    activation: Activation = Activation.NONE
    accumulate: bool = False
    alpha: float = 1.0
    quantized_x: QuantizedRows | None = None
    terms: int | None = None
    kernel: str = "rootgraft_linear"

    def __post_init__(self) -> None:
        num_outputs = self.weight.num_outputs
        gated = self.activation is not Activation.NONE
        assert self.x.shape[1] == self.weight.num_inputs
        assert self.out.shape[1] == (num_outputs // 2 if gated else num_outputs)
        assert not gated or num_outputs % PANEL == 0
        assert self.bias is None or (self.bias.shape == (num_outputs,) and self.bias.dtype == torch.float32)
        assert self.quantized_x is None or self.quantized_x.num_groups * GROUP == self.weight.num_inputs

    def arguments(self) -> ctypes.Structure:
        quantized = self.quantized_x if self.weight.format.is_quantized else None
        return LinearArgs(
            address(self.x),
            row_stride(self.x),
            address(self.weight.data),
            self.weight.format,
            address(self.bias),
            address(self.out),
            row_stride(self.out),
            self.weight.num_inputs,
            self.weight.num_outputs,
            self.activation,
            self.accumulate,
            self.alpha,
            None if quantized is None else address(quantized.values),
            None if quantized is None else address(quantized.scales),
            None if quantized is None else address(quantized.sums),
            -1 if self.terms is None else self.terms,
        )

    def reference(self, step: Step) -> None:
        self.compute(step.num_rows, None if self.terms is None else VariantRows.of(step))

    def compute(self, num_rows: int, variants: VariantRows | None) -> None:
        """The definition, for the first rows; variants: of these rows, None where they have none."""
        x = self.x[:num_rows]
        if self.quantized_x is not None and self.weight.format.is_quantized:
            values = self.quantized_x.values[:num_rows].view(num_rows, self.quantized_x.num_groups, GROUP)
            x = (values * self.quantized_x.scales[:num_rows, :, None]).flatten(1)[:, : x.shape[1]]
        y = F.linear(x, self.weight.unpack())
        if self.terms is not None and variants is not None:
            add_terms(y, self.x[:num_rows], variants, self.terms)
        y = (y if self.bias is None else y + self.bias) * self.alpha
        if self.activation is not Activation.NONE:
            pairs = y.view(num_rows, y.shape[1] // PANEL, 2, PANEL // 2)
            gate, up = pairs[:, :, 0].flatten(1), pairs[:, :, 1].flatten(1)
            y = (F.silu(gate) if self.activation is Activation.SILU else F.gelu(gate, approximate="tanh")) * up
        if self.accumulate:
            self.out[:num_rows] += y
        else:
            self.out[:num_rows] = y

    def bytes_moved(self, step: Step) -> int:
        of_terms = 0
        if self.terms is not None and step.variants is not None:
            of_terms = step.variants.epilogue_bytes(self.terms)
        return self.weight.num_bytes + of_terms + 4 * step.num_rows * (self.x.shape[1] + self.out.shape[1])

    def flops(self, step: Step) -> int:
        return 2 * step.num_rows * self.weight.num_inputs * self.weight.num_outputs
