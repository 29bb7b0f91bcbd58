"""Whole tiny models through the kernels for GPUs, run by Triton's interpreter, equal those through the references."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from delta.variant_terms import LinearTerms, VariantTerms
from model_worker.engine.layers import (
    merged_rows,
    rms_norm as rms_norm_layers,
    rotary_attention as attention_layers,
    row_terms,
)
from model_worker.engine.lora.bound_variant import VariantSegment, VariantSegments
from model_worker.engine.models import gpu_layer, gpu_mixture
from model_worker.engine.models.gpu_decoder import GpuDecoder
from model_worker.engine.ops.experts.functional import ExpertGroups
from model_worker.engine.ops.linear import Activation
from model_worker.engine.ops.low_rank import SegmentPlan
from model_worker.engine.ops.rotary.functional import RotaryCosSin
from model_worker.engine.ops.sign_matmul import merged_linear
from tests.fakes.decoder_steps import MAX_MODEL_LEN, Sequences
from tests.fakes.random_terms import random_plane
from tests.fakes.random_variants import linear_terms, random_variant
from tests.fakes.tiny_models import build_tiny_model

CPU = torch.device("cpu")
OPS = "model_worker.engine.ops"


@pytest.fixture
def _on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers launch kernels for tensors of the CPU, too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined, and where they are called
    pytest.importorskip("triton")
    norms, activation, rotary, attention, experts = (
        importlib.import_module(f"{OPS}.{name}.triton")
        for name in ("rms_norm", "gated_activation", "rotary", "paged_attention", "experts")
    )

    def rms_norm(x: Tensor, weight: Tensor, epsilon: float, **options: Any) -> Tensor:
        return norms.rms_norm(x, weight, epsilon, **{"num_heads": 1, "out": None, "row_weights": None, **options})

    def gated_activation(x: Tensor, kind: Activation) -> Tensor:
        out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype)
        activation.gated_activation(x, kind, out)
        return out

    def rotary_table(positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype) -> RotaryCosSin:
        cos, sin = torch.empty(2, len(positions), len(frequencies), dtype=dtype)
        rotary.fill_rotary_table(positions, frequencies, scaling, cos, sin)
        return RotaryCosSin(cos, sin)

    def rotate_and_write(q: Tensor, k: Tensor, v: Tensor, table: RotaryCosSin | None, *cache: Tensor) -> None:
        if table is None:
            attention.write_kv(k, v, *cache)
        else:
            rotary.rotate_and_write(q, k, v, table.cos, table.sin, *cache)

    monkeypatch.setattr(rms_norm_layers, "rms_norm", rms_norm)
    monkeypatch.setattr(rms_norm_layers, "add_rms_norm", norms.add_rms_norm)
    monkeypatch.setattr(rms_norm_layers, "rms_norm_add", norms.rms_norm_add)
    for module in (gpu_layer, gpu_mixture):
        monkeypatch.setattr(module, "gated_activation", gated_activation)
    _use_kernels_of_experts(monkeypatch, experts)
    monkeypatch.setattr(attention_layers, "rotary_table", rotary_table)
    monkeypatch.setattr(attention_layers, "rotate_and_write", rotate_and_write)
    monkeypatch.setattr(attention_layers, "paged_attention", attention.paged_attention)


def _use_kernels_of_experts(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType) -> None:
    def group_by_expert(choices: Tensor, num_experts: int) -> ExpertGroups:
        return ExpertGroups(*kernels.group_by_expert(choices, num_experts))

    def expert_linear(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gathers: bool = False) -> Tensor:
        found: Tensor = kernels.expert_linear(x, weight, groups.starts, groups.tokens, gathers=gathers)
        return found

    def combine_experts(y: Tensor, groups: ExpertGroups, weights: Tensor) -> Tensor:
        found: Tensor = kernels.combine_experts(y, groups.places, weights)
        return found

    monkeypatch.setattr(gpu_mixture, "select_experts", kernels.select_experts)
    for function in (group_by_expert, expert_linear, combine_experts):
        monkeypatch.setattr(gpu_mixture, function.__name__, function)


def _decoder(family: str, *, has_tables: bool) -> tuple[GpuDecoder, dict[str, Tensor]]:
    model = build_tiny_model(family)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    decoder = GpuDecoder(
        model.config.to_dict(),
        dtype=torch.float32,
        device=CPU,
        quantization=None,
        max_model_len=MAX_MODEL_LEN,
        has_tables=has_tables,
    )
    for name, _ in decoder.weights():
        decoder.fill(name, weights[name])
    decoder.finish()
    return decoder, weights


def _tokens(lengths: Sequence[int]) -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.choice((3, 40, generator.randrange(128))) for _ in range(length)] for length in lengths]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.usefixtures("_on_kernels")
@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "olmo2", "qwen3_moe"])
def test_a_mixed_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base rows and two variants: a prompt beside single tokens, then single tokens."""
    found_by, weights = _decoder(family, has_tables=True)
    terms = [random_variant(weights, seed=0), None, random_variant(weights, seed=1)]
    found = _run(found_by, terms)
    monkeypatch.undo()  # from here on, references
    expected = _run(_decoder(family, has_tables=False)[0], terms)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_on_kernels")
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "mixtral"])
def test_prompts_whose_planes_are_merged_with_the_base(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of three variants and the base, single tokens; in some layers rows are scaled, or have no planes."""
    monkeypatch.setattr(merged_rows, "MIN_ROWS", 5)
    found_by, weights = _decoder(family, has_tables=True)
    variants = [_with_planes(weights, num_planes, seed) for seed, num_planes in enumerate((1, 2, 3))]
    terms = [variants[0], variants[1], None, random_variant(weights, seed=3), variants[0], variants[2]]
    merged: list[tuple[str, int]] = []

    def note(x: Tensor, out: Tensor, *rest: Any, num_planes: int) -> None:
        merged.append((f"{x.shape[1]} to {out.shape[1]}", num_planes))
        merged_linear(x, out, *rest, num_planes=num_planes)

    monkeypatch.setattr(row_terms, "merged_linear", note)
    steps = ((1, 7, 9, 1, 12, 1), (6, 1, 1, 11, 3, 5))
    found = _run(found_by, terms, steps)
    assert {planes for _, planes in merged} == {1, 2}
    layers = {layer for layer, _ in merged}
    assert len(layers) >= (2 if family == "mixtral" else 4)
    assert "32 to 4" not in layers  # a router
    monkeypatch.undo()
    expected = _run(_decoder(family, has_tables=False)[0], terms, steps)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _with_planes(weights: dict[str, Tensor], num_planes: int, seed: int) -> VariantTerms:
    """Planes and low-rank terms in two thirds of the layers, biases in some of them."""
    torch.manual_seed(seed)
    linears = {}
    for place, (name, weight) in enumerate(weights.items()):
        if weight.ndim == 2 and "layers" in name and (place + seed) % 3:
            planes = tuple(
                random_plane(*weight.shape, scale=0.05, has_columns=bool(place % 2)) for _ in range(num_planes)
            )
            bias = torch.randn(len(weight)) * 0.1 if place % 4 == 0 else None
            low_rank = linear_terms(weight, "low rank")
            linears[name.removesuffix(".weight")] = replace(low_rank, signs=planes, bias=bias)
    return VariantTerms(f"sha256:{seed}", linears)


def _run(
    decoder: GpuDecoder,
    terms: Sequence[VariantTerms | None],
    steps: Sequence[Sequence[int]] = ((1, 2, 18), (1, 1, 1)),
) -> list[Tensor]:
    sequences = Sequences(decoder, [None if each is None else decoder.bind(each) for each in terms])
    with torch.inference_mode():
        return [logits for step in steps for logits in sequences.step(_tokens(step))]


@pytest.mark.usefixtures("_on_kernels")
def test_what_a_graph_captures_serves_any_mix() -> None:
    """The same terms, filled for one mix after another, and a step for each without a graph."""
    decoder, weights = _decoder("llama-tied", has_tables=True)
    adapter, delta = (decoder.bind(_of_kinds(weights, seed, with_signs=bool(seed))) for seed in range(2))
    first, second = (decoder.bind(random_variant(weights, seed=seed)) for seed in (2, 3))
    sequences = Sequences(decoder, [None] * 4)
    mixes: list[tuple[VariantSegments, int]] = [  # and the first of the terms that serve them
        ((VariantSegment(1, 3, adapter),), 0),
        ((), 0),
        ((VariantSegment(0, 1, delta), VariantSegment(1, 2, adapter), VariantSegment(3, 4, delta)), 1),
        ((VariantSegment(0, 2, first), VariantSegment(2, 3, adapter), VariantSegment(3, 4, second)), 2),
    ]
    all_terms = decoder.graph_terms(4)
    ids = torch.tensor([3, 40, 7, 99])
    with torch.inference_mode():
        sequences.step([[int(token)] for token in ids])  # leaves a step's context
        context = decoder.context
        assert context.metadata is not None
        for mix, place in mixes:
            assert [terms.serves(mix) for terms in all_terms] == [kind >= place for kind in range(len(all_terms))]
            context.variants, context.terms = mix, None
            hidden = decoder(ids, context.metadata.positions)
            expected = decoder.logits(hidden, mix)
            terms = all_terms[place]
            terms.fill(mix)
            context.variants, context.terms = (), terms
            found = decoder.logits(decoder(ids, context.metadata.positions), graph_terms=terms)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _of_kinds(weights: dict[str, Tensor], seed: int, *, with_signs: bool) -> VariantTerms:
    """Low-rank terms, or these, signs, norms and the embedding."""
    terms = random_variant(weights, seed=seed)
    if with_signs:
        linears = {name: LinearTerms(a=each.a, b=each.b, signs=each.signs) for name, each in terms.linears.items()}
        return replace(terms, linears=linears)
    linears = {name: LinearTerms(a=each.a, b=each.b) for name, each in terms.linears.items()}
    return replace(terms, linears=linears, embeddings={}, vectors={})


def test_kernels_of_variants_are_launched_before_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tiles of both sizes and layers of every shape."""
    decoder, _ = _decoder("llama-tied", has_tables=True)
    shapes: dict[str, set[tuple[int, ...]]] = {"add_low_rank": set(), "add_signs": set(), "merged_linear": set()}

    def note(name: str, x: Tensor, out: Tensor, *rest: Any, **planes: int) -> None:
        (plan,) = [each for each in rest if isinstance(each, SegmentPlan)]
        if plan.bounds:
            shapes[name].add((*planes.values(), plan.tile_rows, x.shape[1], out.shape[1]))

    for name in shapes:
        monkeypatch.setattr(row_terms, name, partial(note, name))
    monkeypatch.setattr(row_terms, "scale_rows", lambda *args: None)
    decoder._variants.warm_up()
    layers = [(32, 64), (32, 32), (32, 96), (48, 32), (32, 128)]  # qkv, output, gate and up, down, head
    for name in ("add_low_rank", "add_signs"):
        assert shapes[name] == {(tile_rows, *layer) for tile_rows in (16, 64) for layer in layers}
    of_merged = [
        (planes, tile_rows, *layer) for planes, tile_rows in ((1, 128), (1, 256), (2, 128)) for layer in layers
    ]
    assert shapes["merged_linear"] == set(of_merged)
