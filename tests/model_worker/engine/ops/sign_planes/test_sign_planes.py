"""Kernels of sign planes and sparse matrices on every machine level: they do what `reference` says, in both forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from delta.merge_terms import merge_embedding, signs_to_dense
from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane
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
from model_worker.engine.ops.sign_planes.packing import SignPart, pack_signs
from model_worker.engine.ops.sign_planes.reference import unpack
from tests.fakes.random_terms import random_plane, random_sparse, random_ternary

FORMATS = ("float32", "bfloat16", "int8", "int4")


def _weight(format: str, num_outputs: int, num_inputs: int) -> PackedWeight:
    dense = torch.randn(num_outputs, num_inputs) * num_inputs**-0.5
    if format == "int8":
        return pack(quantize_int8(dense))
    if format == "int4":
        return pack(quantize_int4(dense))
    return pack(dense.to(getattr(torch, format)))


def _variant(linears: dict[int, PackedLinear], num_linears: int = 1) -> PackedVariant:
    return PackedVariant(linears, {}, None, num_linears=num_linears, num_norms=0)


def _pack(dtype: torch.dtype, parts: Sequence[LinearPart], *, gated: bool) -> PackedLinear:
    (packed,) = LinearPacker(dtype).pack([LinearLayer(tuple(parts), gated)])
    return packed


def _planes(data: st.DataObject, num_outputs: int, num_inputs: int) -> tuple[SignPlane, ...]:
    scale = num_inputs**-0.5
    match data.draw(st.sampled_from(["none", "one", "plain", "ternary", "residual"])):
        case "none":
            return ()
        case "one":
            return (random_plane(num_outputs, num_inputs, scale=scale),)
        case "plain":
            return (random_plane(num_outputs, num_inputs, scale=scale, has_columns=False),)
        case "ternary":
            return random_ternary(num_outputs, num_inputs, scale=scale)
        case _:
            residual = random_plane(num_outputs, num_inputs, scale=scale / 8)
            return (*random_ternary(num_outputs, num_inputs, scale=scale), residual)


def _terms(data: st.DataObject, num_outputs: int, num_inputs: int) -> LinearTerms:
    rank = data.draw(st.sampled_from([0, 0, 5, 16]))
    share = data.draw(st.sampled_from([None, 0.02, 0.3]))
    return LinearTerms(
        a=torch.randn(rank, num_inputs) * num_inputs**-0.5 if rank else None,
        b=torch.randn(num_outputs, rank) * rank**-0.5 if rank else None,
        output_scale=data.draw(st.sampled_from([None, None, torch.randn(num_outputs)])),
        bias=data.draw(st.sampled_from([None, torch.randn(num_outputs)])),
        dense=torch.randn(num_outputs, num_inputs) / 8 if share is None and data.draw(st.booleans()) else None,
        signs=_planes(data, num_outputs, num_inputs),
        sparse=None if share is None else random_sparse(num_outputs, num_inputs, share=share, scale=0.2),
    )


def _segments(lengths: Sequence[int], variants: Sequence[PackedVariant | None]) -> tuple[PackedSegment, ...]:
    segments, start = [], 0
    for length, variant in zip(lengths, variants, strict=True):
        if variant is not None:
            segments.append(PackedSegment(start, start + length, variant))
        start += length
    return tuple(segments)


def _products(team: Team, x: Tensor, weight: PackedWeight, out: Tensor, **options: object) -> list[Operation]:
    """A linear layer as the decoder computes it for variants."""
    operations: list[Operation] = [Shrink("shrink", x, 0)]
    quantized = None
    if weight.format.is_quantized and team.library.level.has_integer_dot:
        quantized = QuantizedRows.allocate(len(x), x.shape[1])
        operations.append(QuantizeRows("quantize", x, quantized))
    return [*operations, Linear("linear", x, weight, out, quantized_x=quantized, terms=0, **options)]  # type: ignore[arg-type]


def _check(team: Team, operations: Sequence[Operation], step: Step, out: Tensor) -> None:
    """The kernels leave in `out` what the references do."""
    before = out.clone()
    Program(team, operations).run(step)
    found = out.clone()
    out.copy_(before)
    for operation in operations:
        if not isinstance(operation, QuantizeRows):  # whose kernel may round another way halfway between two integers
            operation.reference(step)
    torch.testing.assert_close(found, out, rtol=2e-4, atol=2e-4)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_linear_layers(team: Team, data: st.DataObject) -> None:
    """Fused parts with and without planes; long and short segments of several variants and the base in one step."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    format = data.draw(st.sampled_from(FORMATS))
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    gated = data.draw(st.booleans())
    if format.startswith("int"):
        num_inputs = data.draw(st.sampled_from([32, 96, 800]))
    else:
        num_inputs = data.draw(st.sampled_from([1, 7, 31, 32, 33, 64, 90, 800]))
    if gated:
        half = data.draw(st.integers(1, 40))
        sizes = data.draw(st.sampled_from([[half, half], [2 * half]]))
        num_outputs = -(-half // 16) * 32
    else:
        sizes = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
        num_outputs = sum(sizes)
    lengths = data.draw(st.lists(st.sampled_from([1, 1, 2, 3, 7, 15, 16, 40, 130]), min_size=1, max_size=5))
    variants: list[PackedVariant | None] = []
    for _ in lengths:
        if data.draw(st.integers(0, 4)) == 0:
            variants.append(None)
            continue
        parts = [LinearPart(size, _terms(data, size, num_inputs)) for size in sizes]
        variants.append(_variant({0: _pack(dtype, parts, gated=gated)}))
    num_rows = sum(lengths)
    x = torch.randn(num_rows, num_inputs)
    out = torch.randn(num_rows, num_outputs // 2 if gated else num_outputs)
    operations = _products(
        team,
        x,
        _weight(format, num_outputs, num_inputs),
        out,
        bias=data.draw(st.sampled_from([None, torch.randn(num_outputs)])),
        activation=Activation.SILU if gated else Activation.NONE,
        accumulate=data.draw(st.booleans()),
        alpha=data.draw(st.sampled_from([1.0, -3.0])),
    )
    _check(
        team,
        operations,
        Step.of_rows(num_rows, StepVariants(_segments(lengths, variants), num_rows, team.num_threads)),
        out,
    )


@pytest.mark.parametrize(
    ("sizes", "gated"),
    [
        *((sizes, False) for sizes in [(64, 32, 32), (20, 7, 9), (100,), (13, 13)]),
        *((sizes, True) for sizes in [(100,), (48, 48), (13, 13)]),  # a gated layer has two halves
    ],
)
def test_packed_planes_are_the_matrices_that_were_packed(sizes: tuple[int, ...], gated: bool) -> None:
    torch.manual_seed(0)
    num_inputs = 45
    kinds = [(random_plane(sizes[0], num_inputs),), (), random_ternary(sizes[-1], num_inputs)][-len(sizes) :]
    packed = pack_signs([SignPart(size, kind) for size, kind in zip(sizes, kinds, strict=True)], gated=gated)
    assert packed is not None
    dense = torch.zeros(sum(sizes), num_inputs)
    start = 0
    for size, planes in zip(sizes, kinds, strict=True):
        for plane in planes:
            dense[start : start + size] += signs_to_dense(plane, num_inputs)
        start += size
    expected = interleave_gated(*dense.chunk(2)) if gated else dense
    found = unpack(packed, num_inputs)
    torch.testing.assert_close(found[: len(expected)], expected)
    assert not found[len(expected) :].any()
    distinct = {id(plane.column_scale) for planes in kinds for plane in planes}
    assert len(packed.column_scales) == len(distinct)
    if all(size % 16 == 0 for size in sizes):
        assert len(packed.blocks) == sum(size // 16 * len(planes) for size, planes in zip(sizes, kinds, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_bits_depend_on_the_form_alone(team: Team, format: str) -> None:
    """A row of a short segment has the same bits in any company, and so has one of a long segment."""
    torch.manual_seed(0)
    num_inputs, num_outputs = 96, 88
    weight = _weight(format, num_outputs, num_inputs)
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    terms = LinearTerms(
        a=torch.randn(5, num_inputs) / 8,
        b=torch.randn(num_outputs, 5),
        signs=(random_plane(num_outputs, num_inputs), *random_ternary(num_outputs, num_inputs)),
        sparse=random_sparse(num_outputs, num_inputs),
    )
    variant, other = (
        _variant({0: _pack(dtype, [LinearPart(num_outputs, each)], gated=False)})
        for each in (terms, LinearTerms(signs=random_ternary(num_outputs, num_inputs)))
    )
    x = torch.randn(200, num_inputs)

    def rows(first: int, count: int, *, before: int = 0) -> Tensor:
        """Rows [first, first + count) of x as a segment, after some rows of another variant and the base."""
        inputs = torch.cat([torch.randn(before, num_inputs), x[first : first + count]])
        out = torch.zeros(len(inputs), num_outputs)
        segments = [PackedSegment(0, before // 2, other)] if before else []
        segments.append(PackedSegment(before, before + count, variant))
        step = Step.of_rows(len(inputs), StepVariants(segments, len(inputs), team.num_threads))
        Program(team, _products(team, inputs, weight, out)).run(step)
        return out[before:]

    long, short = rows(0, 200), torch.cat([rows(i, 1) for i in range(30)])
    assert torch.equal(rows(3, 16, before=113), long[3:19])  # parts of it are in two tiles
    assert torch.equal(rows(100, 90), long[100:190])
    for count in (2, 3, 4, 5, 7, 12, 15):
        assert torch.equal(rows(4, count, before=3), short[4 : 4 + count])
    assert torch.equal(rows(4, 10, before=115), short[4:14])
    torch.testing.assert_close(short, long[:30], rtol=1e-5, atol=2e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_experts(team: Team, data: st.DataObject) -> None:
    """Every expert has planes of its own, or none."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    num_experts, num_chosen, num_inputs = 4, data.draw(st.integers(1, 3)), 40
    gated = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 9, 60]), min_size=1, max_size=4))
    variants: list[PackedVariant | None] = []
    for _ in lengths:
        linears = {}
        for expert in range(num_experts):
            if data.draw(st.booleans()):
                part = LinearPart(64, _terms(data, 64, num_inputs))
                linears[2 + expert] = _pack(torch.float32, [part], gated=gated)
        variants.append(_variant(linears, 2 + num_experts) if linears else None)
    num_rows = sum(lengths)
    plan = ExpertPlan.allocate(num_rows, num_experts, num_chosen)
    plan.experts.copy_(torch.stack([torch.randperm(num_experts)[:num_chosen] for _ in range(num_rows)]))
    weights = [_weight("float32", 64, num_inputs) for _ in range(num_experts)]
    weight = PackedWeight(torch.cat([each.data for each in weights]), weights[0].format, 64 * num_experts, num_inputs)
    x, out = torch.randn(num_rows * num_chosen, num_inputs), torch.zeros(num_rows * num_chosen, 32 if gated else 64)
    operations: list[Operation] = [
        GroupByExpert("group", plan),
        Shrink("shrink", x, 2, ExpertRows(plan.starts, plan.tokens)),
        ExpertLinear("experts", x, weight, out, plan, Activation.GELU_TANH if gated else Activation.NONE, terms=2),
    ]
    _check(
        team,
        operations,
        Step.of_rows(num_rows, StepVariants(_segments(lengths, variants), num_rows * num_chosen, team.num_threads)),
        out,
    )


@pytest.mark.parametrize("size", [37, 64])
def test_embeddings(team: Team, size: int) -> None:
    torch.manual_seed(0)
    vocab = 40
    table = torch.randn(vocab, size)
    signs = (random_plane(vocab, size), *random_ternary(vocab, size))
    kinds = [
        EmbeddingTerms(signs=signs),
        EmbeddingTerms(
            torch.tensor([2, 5, 39]), torch.randn(3, size), torch.randn(3, vocab), torch.randn(size, 3), signs
        ),
    ]
    extra = torch.randn(7, size)  # rows of tokens that the base does not have
    kinds += [dataclasses.replace(terms, extra_rows=extra) for terms in kinds] + [EmbeddingTerms(extra_rows=extra)]
    packed = pack_signs([SignPart(vocab, signs)], gated=False)
    embeddings = [
        dataclasses.replace(pack_embedding(terms, vocab, dtype=torch.float32), signs=packed if terms.signs else None)
        for terms in kinds
    ]
    variants = [PackedVariant({}, {}, each, num_linears=0, num_norms=0) for each in embeddings]
    lengths = [vocab + (0 if terms.extra_rows is None else 7) for terms in kinds] + [vocab]
    ids = torch.cat([torch.arange(length) for length in lengths])
    out, none = torch.zeros(len(ids), size), Step.of_rows(len(ids))
    plan = StepVariants(_segments(lengths, [*variants, None]), len(ids), team.num_threads)
    step = Step(ids, ids, ids[None], none.block_tables, none.query_start, none.seq_lens, plan)
    operations = [Embedding("embedding", pack(table), out, 3.0), AddEmbedding("add", out, 3.0)]
    Program(team, operations).run(step)
    found = out.clone()
    expected = torch.cat([*(merge_embedding(table, terms) for terms in kinds), table]) * 3.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for operation in operations:
        operation.reference(step)
    torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
