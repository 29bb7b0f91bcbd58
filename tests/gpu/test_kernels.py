"""Every kernel on a real GPU equals its reference, in the dtypes and at the sizes that are served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compression.grouped_weight import GroupedWeight
from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from delta.merge_terms import signs_to_dense
from model_worker.engine.ops.experts.functional import (
    combine_experts,
    expert_linear,
    group_by_expert,
    select_experts,
)
from model_worker.engine.ops.gated_activation.functional import gated_activation
from model_worker.engine.ops.linear import Activation
from model_worker.engine.ops.low_rank import Factors, LowRankFactors, SegmentPlan, add_low_rank, table_rows
from model_worker.engine.ops.paged_attention import AttentionParams, paged_attention, write_kv
from model_worker.engine.ops.paged_attention.reference import write_kv_reference
from model_worker.engine.ops.quantized_matmul.functional import pack_groups, quantize_float8, quantized_matmul
from model_worker.engine.ops.rms_norm.functional import add_rms_norm, rms_norm, rms_norm_add
from model_worker.engine.ops.rotary.functional import rotary_table, rotate_and_write
from model_worker.engine.ops.sampling.functional import draw_tokens
from model_worker.engine.ops.sign_matmul import (
    LayerSigns,
    SignMatrix,
    add_signs,
    merged_linear,
    merged_rows,
    planes_table,
)
from tests.fakes.random_terms import random_plane
from tests.gpu.device import DEVICE
from tests.model_worker.engine.ops.paged_attention.attention_batches import Case, batch, compare

GPU, CPU = torch.device(DEVICE), torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
# Sums in another order, rounded once to the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LLAMA = {"heads": (32, 8), "dims": (128, 128), "block_size": 16}
DECODES = [(0, 1), (30, 1), (1500, 1), (63, 1), (64, 1), (1023, 1), (4000, 1)]
MIXED = [(0, 200), (777, 1), (30, 5), (1300, 140), (64, 1), (2000, 3)]
OPTIONS: list[dict[str, Any]] = [
    {"sliding_window": 333},
    {"chunk_size": 512},
    {"softcap": 3.0},
    {"sinks": True},
    {"alibi": torch.float32},
    {"alibi": torch.bfloat16},
    {"softcap": 3.0, "sinks": True, "alibi": torch.float32, "sliding_window": 333},
]

_NEEDS_KERNELS = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU's signs are not in tables")
_READS_ONLY_WHAT_IS_SEEN = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU's attention reads what nobody sees")


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance * scale)


# ---------------------------------------------------------------------------------------------- attention


@_READS_ONLY_WHAT_IS_SEEN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [DECODES, MIXED, [(0, 1000)]], ids=["decode", "mixed", "prompt"])
def test_attention_at_the_shape_of_llama(lengths: list[tuple[int, int]], dtype: torch.dtype) -> None:
    compare(paged_attention, Case(lengths, dtype=dtype, **LLAMA), GPU)


@_READS_ONLY_WHAT_IS_SEEN
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_every_option_of_attention(options: dict[str, Any]) -> None:
    for lengths in (DECODES, MIXED):
        compare(paged_attention, Case(lengths, dtype=torch.bfloat16, options=options), GPU)


@_READS_ONLY_WHAT_IS_SEEN
@pytest.mark.parametrize(
    ("heads", "dims", "dtype"),
    [
        ((9, 3), (64, 64), torch.bfloat16),
        ((4, 4), (80, 80), torch.bfloat16),
        ((4, 4), (192, 128), torch.bfloat16),
        ((4, 2), (256, 256), torch.bfloat16),
        ((4, 2), (256, 256), torch.float32),
        ((71, 1), (64, 64), torch.float16),
    ],
    ids=str,
)
def test_every_shape_of_heads(heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> None:
    compare(paged_attention, Case([(40, 1), (3, 4), (0, 170), (600, 1)], heads=heads, dims=dims, dtype=dtype), GPU)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention_over_float8(dtype: torch.dtype) -> None:
    for lengths in (DECODES, MIXED):
        compare(paged_attention, Case(lengths, dtype=dtype, kv_dtype=torch.float8_e4m3fn, **LLAMA), GPU)


@pytest.mark.skipif(DEVICE == "cpu", reason="there are no graphs")
def test_a_captured_step_reads_new_lengths() -> None:
    metadata, num_blocks = batch([(1300, 1), (80, 1), (20, 1)], 16, GPU)
    key_cache, value_cache = torch.randn(2, num_blocks, 16, 8, 128, device=GPU).bfloat16().unbind(0)
    query, params = torch.randn(3, 32, 128, device=GPU).bfloat16(), AttentionParams(scale=0.1)
    expected = paged_attention(query, key_cache, value_cache, metadata, params)
    lengths = torch.zeros(3, dtype=torch.int32, device=GPU)
    static = replace(metadata, seq_lens=(1, 1, 1), device_seq_lens=lengths, plans={})
    paged_attention(query, key_cache, value_cache, static, params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(query, key_cache, value_cache, static, params)
    for seq_lens in ((1301, 81, 21), (0, 81, 0), (1301, 0, 21)):
        lengths.copy_(torch.tensor(seq_lens, dtype=torch.int32))
        graph.replay()
        for row, length in enumerate(seq_lens):
            assert torch.equal(out[row], expected[row] if length else torch.zeros_like(out[row]))


# ---------------------------------------------------------------------------------------------- rotary, KV writing


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "half"), [((32, 8), 128, 64), ((9, 3), 64, 32), ((7, 1), 80, 20)])
def test_rotation_and_writing(
    heads: tuple[int, int], dim: int, half: int, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    num_rows = 37
    positions = torch.randint(131072, (num_rows,))
    widths = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
    slots = torch.randperm(64)[:num_rows]
    slots[3] = slots[20] = -1
    frequencies = 1.0 / 500000.0 ** (torch.arange(half).float() / half)
    qkv = torch.randn(num_rows, sum(widths)).to(dtype)
    found = {}
    for device in (CPU, GPU):
        query, key, value = (part.unflatten(1, (-1, dim)) for part in qkv.clone().to(device).split(widths, dim=1))
        table = rotary_table(positions.to(device), frequencies.to(device), 1.0, dtype)
        caches = [torch.zeros(4, 16, heads[1], dim, dtype=kv_dtype or dtype, device=device) for _ in range(2)]
        rotate_and_write(query, key, value, table, caches[0], caches[1], slots.to(device))
        found[device] = (query[slots.to(device) >= 0], *(cache.float() for cache in caches))
    for ours, expected in zip(found[GPU], found[CPU], strict=True):
        step = 0.13 if kv_dtype is not None else TOLERANCE[dtype]  # the table may round to the other neighbour
        torch.testing.assert_close(ours.cpu(), expected, rtol=step, atol=step)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_writing_rounds_as_torch_does(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    key, value = (torch.randn(2, 50, 8, 128) * 2.0 ** torch.randint(-12, 10, (2, 50, 1, 1))).to(dtype)
    slots = torch.randperm(64)[:50]
    slots[7] = -1
    caches = {
        device: [torch.zeros(4, 16, 8, 128, dtype=kv_dtype or dtype, device=device) for _ in range(2)]
        for device in (CPU, GPU)
    }
    write_kv(key.to(GPU), value.to(GPU), *caches[GPU], slots.to(GPU))
    write_kv_reference(key, value, *caches[CPU], slots)
    for ours, expected in zip(caches[GPU], caches[CPU], strict=True):
        assert torch.equal(ours.cpu().float(), expected.float())


# ---------------------------------------------------------------------------------------------- norms, activations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 4096), (300, 4096), (5, 576), (33, 5120)])
def test_norms(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, num_rows, size).to(dtype).unbind(0)
    for weight in (torch.randn(size).to(dtype), torch.randn(size)):
        _close(rms_norm(x.to(GPU), weight.to(GPU), 1e-5), rms_norm(x, weight, 1e-5), dtype)
        for function in (add_rms_norm, rms_norm_add):
            ours, expected = residual.to(GPU), residual.clone()
            found, wanted = function(x.to(GPU), ours, weight.to(GPU), 1e-5), function(x, expected, weight, 1e-5)
            _close(ours, expected, dtype, 3.0)
            if wanted is not None:
                assert found is not None
                _close(found, wanted, dtype, 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH])
def test_gated_activations(activation: Activation, dtype: torch.dtype) -> None:
    for shape in ((1, 28672), (129, 3072)):
        x = (torch.randn(shape) * 3).to(dtype)
        _close(gated_activation(x.to(GPU), activation), gated_activation(x, activation), dtype)


# ---------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_rows_each", [1, 150])
def test_low_rank_terms(num_rows_each: int, dtype: torch.dtype) -> None:
    ranks, num_inputs, widths = (8, 16, 64, 3), 4096, (4096, 1024, 1024)
    bounds = [(number * num_rows_each, (number + 1) * num_rows_each) for number in range(len(ranks))]
    num_rows = len(ranks) * num_rows_each + 2
    pairs = [
        tuple(
            Factors((torch.randn(rank, num_inputs) / 64).to(dtype), (torch.randn(width, rank) / 8).to(dtype))
            for rank in ranks
        )
        for width in widths
    ]
    x, base = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_rows, sum(widths)).to(dtype)
    expected = base.clone()
    plan = SegmentPlan.of(bounds, num_rows=num_rows, max_rank=max(ranks), device=CPU)
    add_low_rank(x, expected, LowRankFactors(tuple(pairs), widths, None), plan)
    there = [tuple(Factors(each.a.to(GPU), each.b.to(GPU)) for each in of_part) for of_part in pairs]
    firsts = (0, 4096, 5120)
    table = torch.stack([table_rows(part, first) for part, first in zip(there, firsts, strict=True)]).to(GPU)
    out = base.to(GPU)
    plan = SegmentPlan.of(bounds, num_rows=num_rows, max_rank=max(ranks), device=GPU)
    add_low_rank(x.to(GPU), out, LowRankFactors(tuple(there), widths, table), plan)
    _close(out, expected, dtype, 4.0)


@_NEEDS_KERNELS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_rows_each", [1, 150])
def test_planes_of_signs(num_rows_each: int, dtype: torch.dtype) -> None:
    num_inputs, num_outputs = 4096, 1024
    planes = [[random_plane(num_outputs, num_inputs, scale=num_inputs**-0.5, has_columns=True)] for _ in range(3)]
    bounds = [(number * num_rows_each, (number + 1) * num_rows_each) for number in range(3)]
    num_rows = 3 * num_rows_each + 1
    x, base = torch.randn(num_rows, num_inputs).to(dtype), torch.randn(num_rows, num_outputs).to(dtype)
    expected = base.float()
    for (start, end), of_segment in zip(bounds, planes, strict=True):
        for plane in of_segment:
            expected[start:end] += x[start:end].float() @ signs_to_dense(plane, num_inputs).T
    matrices = [[SignMatrix(plane, num_inputs, dtype=dtype, device=GPU) for plane in each] for each in planes]
    columns = slice(0, num_outputs)
    table = torch.stack([planes_table(each, 1, columns) for each in matrices])[None].to(GPU)
    out = base.to(GPU)
    plan = SegmentPlan.of(bounds, num_rows=num_rows, max_rank=1, device=GPU)
    add_signs(x.to(GPU), out, LayerSigns((), (columns,), table), plan)
    _close(out, expected.to(dtype), dtype, 3.0)


@_NEEDS_KERNELS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("num_rows_each", "num_planes"), [(300, 1), (400, 1), (300, 2)])
def test_planes_merged_with_the_base(num_rows_each: int, num_planes: int, dtype: torch.dtype) -> None:
    """Tiles of both sizes, of three segments; the last row is in none."""
    num_inputs, num_outputs = 4096, 1024
    planes = [
        [random_plane(num_outputs, num_inputs, scale=0.1 * num_inputs**-0.5) for _ in range(num_planes)]
        for _ in range(3)
    ]
    bounds = [(number * num_rows_each, (number + 1) * num_rows_each) for number in range(3)]
    num_rows = 3 * num_rows_each
    x = torch.randn(num_rows + 1, num_inputs).to(dtype)
    weight = (torch.randn(num_outputs, num_inputs) * num_inputs**-0.5).to(dtype)
    expected = torch.empty(num_rows, num_outputs)
    for (start, end), of_segment in zip(bounds, planes, strict=True):
        merged = weight.float() + sum(signs_to_dense(plane, num_inputs) for plane in of_segment)
        expected[start:end] = x[start:end].float() @ merged.T
    matrices = [[SignMatrix(plane, num_inputs, dtype=dtype, device=GPU) for plane in each] for each in planes]
    columns = slice(0, num_outputs)
    table = torch.stack([planes_table(each, num_planes, columns) for each in matrices])[None].to(GPU)
    plan = SegmentPlan(num_rows + 1, tuple(bounds), 1).tiled(GPU, tile_rows=merged_rows(num_rows, num_planes))
    out = torch.full((num_rows + 1, num_outputs), 7.0, dtype=dtype, device=GPU)
    signs = LayerSigns((), (columns,), table)
    merged_linear(x.to(GPU), out, weight.to(GPU), None, signs, plan, num_planes=num_planes)
    assert (out[-1] == 7.0).all()
    _close(out[:-1], expected.to(dtype), dtype, 3.0)


# ---------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 7, 64, 300, 1500])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(8, 2), (128, 8)])
def test_mixtures_of_experts(num_experts: int, num_chosen: int, num_rows: int, dtype: torch.dtype) -> None:
    """Each function after what the reference makes of the ones before it."""
    hidden, inner = 512, 320
    logits = torch.randn(num_rows, num_experts).to(dtype)
    choices, weights = select_experts(logits, num_chosen, normalize=True)
    found_choices, found_weights = select_experts(logits.to(GPU), num_chosen, normalize=True)
    torch.testing.assert_close(found_weights.cpu(), weights, rtol=1e-5, atol=1e-6)
    shares = logits.float().softmax(dim=1)  # of which some may be as good as equal
    torch.testing.assert_close(
        shares.gather(1, found_choices.cpu().long()), shares.gather(1, choices.long()), rtol=1e-5, atol=1e-7
    )
    groups = group_by_expert(choices, num_experts)
    there = group_by_expert(choices.to(GPU), num_experts)
    assert torch.equal(there.starts.cpu(), groups.starts)
    assert torch.equal(there.tokens.cpu(), groups.tokens)
    assert torch.equal(there.places.cpu(), groups.places)
    x = torch.randn(num_rows, hidden).to(dtype)
    matrix = (torch.randn(num_experts, inner, hidden) * hidden**-0.5).to(dtype)
    y = expert_linear(x, matrix, groups, gathers=True)
    found = expert_linear(x.to(GPU), matrix.to(GPU), there, gathers=True)
    _close(found, y, dtype, 4.0)
    back = matrix.transpose(1, 2).contiguous()
    out = expert_linear(y, back, groups)
    _close(expert_linear(y.to(GPU), back.to(GPU), there), out, dtype, 4.0)
    expected = combine_experts(out, groups, weights)
    _close(combine_experts(out.to(GPU), there, weights.to(GPU)), expected, dtype, 4.0)


# ---------------------------------------------------------------------------------------------- quantized weights


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 16, 100])
@pytest.mark.parametrize("bits", [4, 8, "float8"])
def test_quantized_weights(bits: int | str, num_rows: int, dtype: torch.dtype) -> None:
    matrix, x = torch.randn(6144, 4096) / 64, torch.randn(num_rows, 4096).to(dtype)
    if bits == "float8":
        weight, there = quantize_float8(matrix), quantize_float8(matrix.to(GPU))
        _close(quantized_matmul(x.to(GPU), there), quantized_matmul(x, weight), dtype, 2.0)
        return
    grouped = (quantize_int4 if bits == 4 else quantize_int8)(matrix)
    found = quantized_matmul(x.to(GPU), pack_groups(grouped, GPU))
    _close(found, quantized_matmul(x, pack_groups(grouped)), dtype, 2.0)


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_weights_are_quantized_where_they_are(quantize: Callable[[Tensor], GroupedWeight]) -> None:
    matrix = torch.randn(4096, 4096) / 64  # 2^19 groups, more than are worked on at a time
    there = quantize(matrix.to(GPU))
    assert there.values.device.type == GPU.type
    # Sums in another order may choose another grid for a group.
    difference = there.dequantize().cpu() - quantize(matrix).dequantize()
    assert difference.norm() < 0.01 * matrix.norm()


# ---------------------------------------------------------------------------------------------- sampling


def test_draws() -> None:
    vocab_size = 128256
    kinds = [(1.0, 0.0, 1, 1.0), (1.0, 0.0, vocab_size, 1.0), (1.4, 0.05, 50, 0.9), (0.7, 0.0, vocab_size, 0.8)] * 8
    logits = torch.randn(len(kinds), vocab_size) * 4
    uniform = torch.rand(len(kinds), 1, dtype=torch.float64)
    parameters = torch.cat((torch.tensor(kinds, dtype=torch.float64), uniform), dim=1)
    logits[5, 7] = torch.nan
    expected = draw_tokens(logits, parameters)
    found = draw_tokens(logits.to(GPU), parameters.to(GPU))
    assert torch.equal(found.finite.cpu(), expected.finite)
    # exp is rounded in another way: a token at a limit may differ.
    assert (found.tokens.cpu() == expected.tokens).sum() >= len(kinds) - 1
