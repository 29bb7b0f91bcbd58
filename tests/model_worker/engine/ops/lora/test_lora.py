"""The kernels of variants on every machine level: they do what `reference` says, whoever the neighbours are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from delta.variant_terms import EmbeddingTerms, LinearTerms
from model_worker.engine.ops.cpu.program import Operation, Program, Step, Team
from model_worker.engine.ops.cpu.step_variants import PackedLinear, PackedSegment, PackedVariant, StepVariants
from model_worker.engine.ops.embedding import Embedding
from model_worker.engine.ops.experts import ExpertLinear, ExpertPlan, GroupByExpert
from model_worker.engine.ops.linear import (
    Activation,
    Linear,
    PackedWeight,
    QuantizedRows,
    QuantizeRows,
    interleave_gated,
    pack,
)
from model_worker.engine.ops.lora import AddEmbedding, ExpertRows, Shrink
from model_worker.engine.ops.lora.packing import LinearLayer, LinearPacker, LinearPart, pack_embedding
from model_worker.engine.ops.lora.reference import unpack_b
from model_worker.engine.ops.rms_norm import RMSNorm

RANKS = (0, 1, 3, 8, 16, 64, 200)


def _packed(parts: Sequence[LinearPart], dtype: torch.dtype, *, gated: bool = False) -> PackedLinear:
    (packed,) = LinearPacker(dtype).pack([LinearLayer(tuple(parts), gated)])
    return packed


def _low_rank(num_outputs: int, num_inputs: int, rank: int) -> LinearTerms:
    """Terms whose products with unit rows are about 1."""
    if rank == 0:
        return LinearTerms()
    return LinearTerms(
        a=torch.randn(rank, num_inputs) * num_inputs**-0.5, b=torch.randn(num_outputs, rank) * rank**-0.5
    )


def _variant(linears: dict[int, PackedLinear], num_linears: int = 1) -> PackedVariant:
    return PackedVariant(linears, {}, None, num_linears=num_linears, num_norms=0)


def _weight(format: str, num_outputs: int, num_inputs: int) -> PackedWeight:
    dense = torch.randn(num_outputs, num_inputs) * num_inputs**-0.5
    if format == "int8":
        return pack(quantize_int8(dense))
    if format == "int4":
        return pack(quantize_int4(dense))
    return pack(dense.to(getattr(torch, format)))


def _segments(lengths: Sequence[int], variants: Sequence[PackedVariant | None]) -> tuple[PackedSegment, ...]:
    segments, start = [], 0
    for length, variant in zip(lengths, variants, strict=True):
        if variant is not None:
            segments.append(PackedSegment(start, start + length, variant))
        start += length
    return tuple(segments)


def _run(team: Team, operations: Sequence[Operation], step: Step) -> None:
    Program(team, operations).run(step)


def _products(team: Team, x: Tensor, weight: PackedWeight, out: Tensor, **options: object) -> list[Operation]:
    """A linear layer as the decoder computes it for variants."""
    operations: list[Operation] = [Shrink("shrink", x, 0)]
    quantized = None
    if weight.format.is_quantized and team.library.level.has_integer_dot:
        quantized = QuantizedRows.allocate(len(x), x.shape[1])
        operations.append(QuantizeRows("quantize", x, quantized))
    return [*operations, Linear("linear", x, weight, out, quantized_x=quantized, terms=0, **options)]  # type: ignore[arg-type]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_linear_layers(team: Team, data: st.DataObject) -> None:
    """Several variants and the base in one step, each with the terms that it happens to have."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    format = data.draw(st.sampled_from(["float32", "bfloat16", "int8", "int4"]))
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    gated = data.draw(st.booleans())
    num_inputs = data.draw(st.integers(1, 5)) * 32 if format.startswith("int") else data.draw(st.integers(1, 90))
    if gated:
        half = data.draw(st.integers(1, 40))
        sizes = data.draw(st.sampled_from([[half, half], [2 * half]]))
        num_outputs = -(-half // 16) * 32
    else:
        sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
        num_outputs = sum(sizes)
    variants: list[PackedVariant | None] = []
    lengths = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 50, 130]), min_size=1, max_size=5))
    for _ in lengths:
        if data.draw(st.integers(0, 3)) == 0:
            variants.append(None)
            continue
        parts = []
        for size in sizes:
            low_rank = _low_rank(size, num_inputs, data.draw(st.sampled_from(RANKS)))
            parts.append(
                LinearPart(
                    size,
                    LinearTerms(
                        a=low_rank.a,
                        b=low_rank.b,
                        output_scale=data.draw(st.sampled_from([None, torch.randn(size)])),
                        dense=data.draw(st.sampled_from([None, None, torch.randn(size, num_inputs) / 8])),
                        bias=data.draw(st.sampled_from([None, torch.randn(size)])),
                    ),
                )
            )
        variants.append(_variant({0: _packed(parts, dtype, gated=gated)}))
    num_rows = sum(lengths)
    weight = _weight(format, num_outputs, num_inputs)
    x = torch.randn(num_rows, num_inputs)
    out = torch.randn(num_rows, num_outputs // 2 if gated else num_outputs)
    operations = _products(
        team,
        x,
        weight,
        out,
        bias=data.draw(st.sampled_from([None, torch.randn(num_outputs)])),
        activation=Activation.SILU if gated else Activation.NONE,
        accumulate=data.draw(st.booleans()),
        alpha=data.draw(st.sampled_from([1.0, -3.0])),
    )
    step = Step.of_rows(num_rows, StepVariants(_segments(lengths, variants), num_rows, team.num_threads))
    before = out.clone()
    _run(team, operations, step)
    got = out.clone()
    out.copy_(before)
    for operation in operations:
        if not isinstance(operation, QuantizeRows):  # whose kernel may round another way halfway between two integers
            operation.reference(step)
    torch.testing.assert_close(got, out, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_packed_together_are_as_if_packed_alone(dtype: torch.dtype) -> None:
    layers = [
        LinearLayer(tuple(LinearPart(size, _low_rank(size, num_inputs, rank)) for size, rank in parts), gated)
        for _ in range(2)
        for num_inputs, gated, parts in [
            (96, False, [(64, 3), (20, 0), (7, 4)]),
            (88, False, [(64, 3), (20, 0), (7, 4)]),
            (96, True, [(40, 3), (40, 5)]),
            (96, False, [(64, 0)]),
        ]
    ]
    together = LinearPacker(dtype).pack(layers)
    for layer, packed in zip(layers, together, strict=True):
        alone = _packed(layer.parts, dtype, gated=layer.gated)
        for name in ("a", "b", "units"):
            torch.testing.assert_close(getattr(packed, name), getattr(alone, name), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sizes", "gated"),
    [
        *((sizes, False) for sizes in [(64, 32, 32), (20, 7, 9), (100,), (48, 48), (13, 13)]),
        *((sizes, True) for sizes in [(100,), (48, 48), (13, 13)]),  # a gated layer has two halves
    ],
)
def test_units_have_the_ranks_of_their_outputs_only(sizes: tuple[int, ...], gated: bool) -> None:
    torch.manual_seed(0)
    terms = [_low_rank(size, 8, rank) for size, rank in zip(sizes, (3, 0, 5), strict=False)]
    packed = _packed(list(map(LinearPart, sizes, terms)), torch.float32, gated=gated)
    ranks = [term.rank for term in terms]
    expected = torch.zeros(sum(sizes), sum(ranks))
    row, rank = 0, 0
    for size, term in zip(sizes, terms, strict=True):
        if term.b is not None:
            expected[row : row + size, rank : rank + term.rank] = term.b
        row, rank = row + size, rank + term.rank
    b = unpack_b(packed)
    if gated:
        expected = interleave_gated(*expected.chunk(2))
    assert torch.equal(b[: len(expected)], expected)
    assert not b[len(expected) :].any()
    assert packed.units is not None
    assert packed.b is not None
    whole = all(size % 16 == 0 for size in sizes)
    if whole:
        assert packed.b.numel() == sum(size * term.rank for size, term in zip(sizes, terms, strict=True))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_has_the_same_bits_in_any_company(team: Team, format: str) -> None:
    torch.manual_seed(0)
    weight = _weight(format, 88, 96)
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    variants = [_variant({0: _packed([LinearPart(88, _low_rank(88, 96, rank))], dtype)}) for rank in (16, 3, 64)]
    lengths = (1, 40, 70)
    x, out = torch.randn(111, 96), torch.zeros(111, 88)
    step = Step.of_rows(111, StepVariants(_segments(lengths, variants), 111, team.num_threads))
    _run(team, _products(team, x, weight, out), step)
    for row, variant in ((0, variants[0]), (1, variants[1]), (17, variants[1]), (40, variants[1]), (110, variants[2])):
        alone = torch.zeros(1, 88)
        step = Step.of_rows(1, StepVariants((PackedSegment(0, 1, variant),), 1, team.num_threads))
        _run(team, _products(team, x[row : row + 1].clone(), weight, alone), step)
        assert torch.equal(alone[0], out[row])


def test_inputs_are_scaled_in_place(team: Team) -> None:
    torch.manual_seed(0)
    scale = torch.randn(37)
    variant = _variant({0: _packed([LinearPart(5, LinearTerms(input_scale=scale))], torch.float32)})
    x = torch.randn(130, 37)
    expected = x.clone()
    expected[20:120] *= scale
    _run(
        team,
        [Shrink("shrink", x, 0)],
        Step.of_rows(130, StepVariants((PackedSegment(20, 120, variant),), 130, team.num_threads)),
    )
    assert torch.equal(x, expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_experts(team: Team, data: st.DataObject) -> None:
    """Every expert has terms of its own, or none."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    num_experts, num_chosen, num_inputs = 5, data.draw(st.integers(1, 3)), 40
    gated = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 9, 60]), min_size=1, max_size=4))
    variants: list[PackedVariant | None] = []
    for _ in lengths:
        linears = {}
        for expert in range(num_experts):
            if (rank := data.draw(st.sampled_from(RANKS))) > 0:
                part = LinearPart(64, _low_rank(64, num_inputs, rank))
                linears[2 + expert] = _packed([part], torch.float32, gated=gated)
        variants.append(_variant(linears, 2 + num_experts) if linears else None)
    num_rows = sum(lengths)
    plan = ExpertPlan.allocate(num_rows, num_experts, num_chosen)
    plan.experts.copy_(torch.stack([torch.randperm(num_experts)[:num_chosen] for _ in range(num_rows)]))
    weights = [_weight("float32", 64, num_inputs) for _ in range(num_experts)]
    weight = PackedWeight(torch.cat([each.data for each in weights]), weights[0].format, 64 * num_experts, num_inputs)
    x, out = torch.randn(num_rows * num_chosen, num_inputs), torch.zeros(num_rows * num_chosen, 32 if gated else 64)
    activation = Activation.GELU_TANH if gated else Activation.NONE
    operations: list[Operation] = [
        GroupByExpert("group", plan),
        Shrink("shrink", x, 2, ExpertRows(plan.starts, plan.tokens)),
        ExpertLinear("experts", x, weight, out, plan, activation, terms=2),
    ]
    step = Step.of_rows(num_rows, StepVariants(_segments(lengths, variants), num_rows * num_chosen, team.num_threads))
    _run(team, operations, step)
    got = out.clone()
    for operation in operations:
        operation.reference(step)
    torch.testing.assert_close(got, out, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings(team: Team, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = EmbeddingTerms(token_ids=torch.tensor([2, 5, 9]), rows=torch.randn(3, 37))
    low_rank = EmbeddingTerms(a=torch.randn(3, 12), b=torch.randn(37, 3))
    both = EmbeddingTerms(rows.token_ids, rows.rows, low_rank.a, low_rank.b)
    variants = [
        PackedVariant({}, {}, pack_embedding(terms, 12, dtype=dtype), num_linears=0, num_norms=0)
        for terms in (rows, low_rank, both)
    ]
    ids = torch.arange(12).repeat(4)
    out = torch.zeros(48, 37)
    empty = Step.of_rows(48)
    plan = StepVariants(_segments((12, 12, 12), variants), 48, team.num_threads)
    step = Step(ids, ids, ids[None], empty.block_tables, empty.query_start, empty.seq_lens, plan)
    operations = [Embedding("embedding", pack(torch.randn(12, 37)), out, 3.0), AddEmbedding("add", out, 3.0)]
    _run(team, operations, step)
    got = out.clone()
    for operation in operations:
        operation.reference(step)
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    assert not torch.equal(got[:12], got[36:])


def test_norms(team: Team) -> None:
    torch.manual_seed(0)
    variant = PackedVariant({}, {1: torch.randn(20)}, None, num_linears=0, num_norms=2)
    x, out = torch.randn(9, 40), torch.zeros(9, 40)
    step = Step.of_rows(9, StepVariants((PackedSegment(2, 5, variant),), 9, team.num_threads))
    for index in (0, 1):
        norm = RMSNorm("norm", x, torch.ones(20), out, 1e-5, num_heads=2, index=index)
        _run(team, [norm], step)
        got = out.clone()
        norm.reference(step)
        torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
