"""Linear layers on every machine level: the kernel does what `reference` says, and writes nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight
from model_worker.engine.ops.cpu.program import Program, Step, Team
from model_worker.engine.ops.linear import (
    Activation,
    Linear,
    PackedWeight,
    QuantizedRows,
    QuantizeRows,
    WeightFormat,
    interleave_gated,
    pack,
)

_DTYPES = {
    WeightFormat.FLOAT32: torch.float32,
    WeightFormat.BFLOAT16: torch.bfloat16,
    WeightFormat.FLOAT16: torch.float16,
}
_ROWS = (1, 2, 5, 12, 13, 33, 130, 300)
_UNTOUCHED = -77.0


def _random_weight(format: WeightFormat, num_outputs: int, num_inputs: int) -> PackedWeight:
    """A weight whose products with unit rows are about 1."""
    size = num_inputs**-0.5
    if format in _DTYPES:
        return pack((torch.randn(num_outputs, num_inputs) * size).to(_DTYPES[format]))
    scales = torch.rand(num_outputs, num_inputs // GROUP) + 0.5
    if format is WeightFormat.INT8:
        values = torch.randint(-128, 128, (num_outputs, num_inputs), dtype=torch.int8)
        return pack(GroupedWeight(values, (scales * size / 74).half()))
    values = torch.randint(0, 16, (num_outputs, num_inputs), dtype=torch.int8)
    scales *= size / 4.6
    return pack(GroupedWeight(values, scales.half(), (-7.5 * scales).half()))


def _rows(num_rows: int, width: int, *, gap: int = 0, fill: float = math.nan) -> Tensor:
    """[num_rows, width] zeros, in rows that are `gap` apart; between and after them stands `fill`."""
    return torch.full((num_rows + 1, width + gap), fill)[:num_rows, :width].zero_()


def _quantized(team: Team, weight: PackedWeight, x: Tensor) -> QuantizedRows | None:
    """Quantized rows where the machine level computes with them."""
    if not (weight.format.is_quantized and team.library.level.has_integer_dot):
        return None
    rows = QuantizedRows.allocate(len(x), x.shape[1])
    QuantizeRows("quantize", x, rows).reference(Step.of_rows(len(x)))
    return rows


def _check(team: Team, linear: Linear, num_rows: int, *, tolerance: float = 2e-5) -> None:
    step = Step.of_rows(num_rows)
    before = linear.out.clone()
    Program(team, [linear]).run(step)
    got = linear.out.clone()
    linear.out.copy_(before)
    linear.reference(step)
    torch.testing.assert_close(got, linear.out, rtol=tolerance, atol=tolerance)
    whole = linear.out._base
    assert whole is not None
    whole[: len(linear.out), : linear.out.shape[1]] = _UNTOUCHED
    assert (whole == _UNTOUCHED).all()


@pytest.mark.parametrize("num_inputs", [64, 96, 576, 1536])
@pytest.mark.parametrize("format", list(WeightFormat), ids=lambda format: format.name)
def test_every_format_and_number_of_rows(team: Team, format: WeightFormat, num_inputs: int) -> None:
    torch.manual_seed(0)
    for num_outputs in (1, 32, 88):
        weight = _random_weight(format, num_outputs, num_inputs)
        for num_rows in _ROWS:
            x = _rows(num_rows, num_inputs, gap=8).normal_()
            out = _rows(num_rows, num_outputs, gap=5, fill=_UNTOUCHED)
            _check(team, Linear("linear", x, weight, out, quantized_x=_quantized(team, weight, x)), num_rows)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_option(team: Team, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    format = data.draw(st.sampled_from(WeightFormat))
    activation = data.draw(st.sampled_from(Activation))
    gated = activation is not Activation.NONE
    num_inputs = data.draw(st.integers(1, 20)) * (GROUP if format.is_quantized else 7)
    num_outputs = data.draw(st.integers(1, 3)) * 32 if gated else data.draw(st.integers(1, 100))
    width = num_outputs // 2 if gated else num_outputs
    num_rows, spare = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 3))
    weight = _random_weight(format, num_outputs, num_inputs)
    x = _rows(num_rows + spare, num_inputs, gap=data.draw(st.integers(0, 3))).normal_()
    out = _rows(num_rows + spare, width, gap=data.draw(st.integers(0, 3)), fill=_UNTOUCHED).normal_()
    linear = Linear(
        "linear",
        x,
        weight,
        out,
        bias=data.draw(st.sampled_from([None, torch.randn(num_outputs)])),
        activation=activation,
        accumulate=data.draw(st.booleans()),
        alpha=data.draw(st.sampled_from([1.0, 0.25, -3.0])),
        quantized_x=_quantized(team, weight, x),
    )
    _check(team, linear, num_rows, tolerance=5e-5)


@pytest.mark.parametrize("num_pairs", [16, 40, 100])
def test_a_gated_weight_is_its_two_projections(team: Team, num_pairs: int) -> None:
    torch.manual_seed(0)
    gate, up, x = torch.randn(num_pairs, 96) / 10, torch.randn(num_pairs, 96) / 10, torch.randn(5, 96)
    weight = pack(interleave_gated(gate, up))
    out = torch.zeros(5, weight.num_outputs // 2)
    Program(team, [Linear("gate_up", x, weight, out, activation=Activation.SILU)]).run(Step.of_rows(5))
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(out[:, :num_pairs], expected, rtol=2e-5, atol=2e-5)
    assert (out[:, num_pairs:] == 0).all()


def _gated(team: Team, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up as the kernel has it, the bias being the whole of the product. -> [len(gate)] float32"""
    weight = pack(torch.zeros(2 * len(gate), 1))
    out = torch.zeros(1, len(gate))
    linear = Linear("gate_up", torch.zeros(1, 1), weight, out, bias=interleave_gated(gate, up), activation=activation)
    Program(team, [linear]).run(Step.of_rows(1))
    return out[0]


def _exact_gate(gate: Tensor, activation: Activation) -> Tensor:
    """In double precision, by the formulas of the package's docstring."""
    z = gate.double()
    return z * torch.sigmoid(z if activation is Activation.SILU else 1.5957691216057308 * (z + 0.044715 * z**3))


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH], ids=lambda a: a.name)
def test_the_activation_is_right_over_all_floats(team: Team, activation: Activation) -> None:
    """Every float16 pattern widened by random low bits: both zeros, denormals, infinities, NaNs."""
    torch.manual_seed(0)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
    gate = torch.cat([patterns, patterns + torch.randint(0, 2**16, patterns.shape, dtype=torch.int32)])
    gate = gate.view(torch.float32)
    got = _gated(team, gate, torch.ones(len(gate)), activation).double()
    expected = _exact_gate(gate, activation).float().double()  # what is beyond the range of float32 is infinite
    # e^x has a relative error of about |x| half units in the last place where the exponent itself is rounded.
    tolerance = 1e-6 if activation is Activation.SILU else 3e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH], ids=lambda a: a.name)
def test_what_is_not_a_number_stays_so(team: Team, activation: Activation) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e38, 1.0, 0.0, 1e-45])
    gate, up = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    got = _gated(team, gate, up, activation)
    expected = (_exact_gate(gate, activation).float().double() * up.double()).float()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("format", list(WeightFormat), ids=lambda format: format.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_input_spoils_its_row_and_no_other(team: Team, format: WeightFormat, bad: float) -> None:
    torch.manual_seed(0)
    weight = _random_weight(format, 33, 96)
    x = torch.randn(14, 96)
    x[3, 40] = bad
    rows = QuantizedRows.allocate(14, 96) if _quantized(team, weight, x) is not None else None
    out = torch.zeros(14, 33)
    quantize = [] if rows is None else [QuantizeRows("quantize", x, rows)]
    Program(team, [*quantize, Linear("linear", x, weight, out, quantized_x=rows)]).run(Step.of_rows(14))
    good = torch.arange(14) != 3
    assert out[good].isfinite().all()
    assert not out[3].isfinite().any()


def test_the_number_of_threads_changes_nothing(team: Team) -> None:
    torch.manual_seed(0)
    weight, x = _random_weight(WeightFormat.BFLOAT16, 300, 576), torch.randn(130, 576)
    results = []
    for num_threads in (1, 2, 3, 8):
        out = torch.zeros(130, 300)
        Program(Team(team.library, num_threads), [Linear("linear", x, weight, out)]).run(Step.of_rows(130))
        results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_does_not_fit_is_refused() -> None:
    weight, x, out = _random_weight(WeightFormat.INT8, 32, 64), torch.zeros(2, 64), torch.zeros(2, 32)
    with pytest.raises(AssertionError):
        Linear("linear", x, weight, out, quantized_x=QuantizedRows.allocate(2, 96))
    with pytest.raises(AssertionError):
        QuantizeRows("quantize", x, QuantizedRows.allocate(2, 96))
    with pytest.raises(AssertionError):
        QuantizeRows("quantize", x, QuantizedRows.allocate(1, 64))
    with pytest.raises(AssertionError):
        Linear("linear", x.half(), weight, out).arguments()
    with pytest.raises(AssertionError):
        Linear("linear", x, weight, out, bias=torch.zeros(32, dtype=torch.bfloat16))


@pytest.mark.parametrize("format", list(WeightFormat), ids=lambda format: format.name)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(team: Team, format: WeightFormat) -> None:
    """Also in another place of the batch, and with inputs beyond one piece of a widened panel."""
    torch.manual_seed(0)
    for num_inputs in (96, 1568):
        weight = _random_weight(format, 64, num_inputs)
        x = torch.randn(300, num_inputs)
        alone: Tensor | None = None
        for num_rows in _ROWS:
            for place in {0, num_rows // 2, num_rows - 1}:
                batch = x[:num_rows].clone()
                batch[place] = x[-1]
                out = torch.empty(num_rows, 64)
                linear = Linear("linear", batch, weight, out, quantized_x=_quantized(team, weight, batch))
                Program(team, [linear]).run(Step.of_rows(num_rows))
                alone = out[place].clone() if alone is None else alone
                assert torch.equal(out[place], alone), (num_inputs, num_rows, place)
