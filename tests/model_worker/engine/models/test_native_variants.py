"""Rows with variants in one batch are what decoders compute whose checkpoints the variants were merged into."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from delta.merge_terms import merge_linear
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from model_worker.engine.lora.bound_variant import VariantSegment
from model_worker.engine.model_parts import OpKind
from model_worker.engine.models.native_decoder import NativeDecoder
from model_worker.engine.ops.cpu.program import KernelLibrary, Team
from registry.errors import UnsupportedModelError
from tests.fakes.decoder_steps import MAX_MODEL_LEN, Sequences
from tests.fakes.random_variants import EMBEDDING, HEAD, Weights, linear_terms, merged_weights, random_variant
from tests.fakes.tiny_models import build_tiny_model

FAMILIES = ("llama", "llama-tied", "qwen3", "gemma2", "phi3", "olmo2", "granite", "mixtral", "qwen3_moe")


def _model(family: str) -> tuple[dict[str, Any], Weights]:
    model = build_tiny_model(family)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return model.config.to_dict(), weights


def _decoder(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    team: Team,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
) -> NativeDecoder:
    decoder = NativeDecoder(
        config, dtype=dtype, quantization=quantization, max_model_len=MAX_MODEL_LEN, max_rows=256, team=team
    )
    for name, _ in decoder.weights():
        decoder.fill(name, weights[name])
    decoder.finish()
    return decoder


def _tokens(lengths: Sequence[int]) -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.choice((3, 40, generator.randrange(128))) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_merged_checkpoints(family: str, team: Team) -> None:
    """Prefills of several lengths, then single tokens beside a second chunk."""
    config, weights = _model(family)
    base = _decoder(config, weights, team)
    terms = [None, *(random_variant(weights, seed=seed) for seed in range(3)), None]
    bound = [None if each is None else base.bind(each) for each in terms]
    batch = Sequences(base, bound)
    steps = [_tokens((3, 20, 1, 7, 5)), _tokens((1, 1, 9, 1, 1)), _tokens((1, 1, 1, 1, 1))]
    found = [batch.step(step) for step in steps]
    for i, each in enumerate(terms):
        merged = merged_weights(weights, VariantTerms("sha256:base") if each is None else each)
        alone = Sequences(_decoder(config | {"tie_word_embeddings": False}, merged, team), [None])
        for step, results in zip(steps, found, strict=True):
            torch.testing.assert_close(results[i], *alone.step([step[i]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8")])
def test_a_row_has_the_same_bits_in_any_company(dtype: str, quantization: str | None, team: Team) -> None:
    config, weights = _model("llama")
    base = _decoder(config, weights, team, dtype=getattr(torch, dtype), quantization=quantization)
    variants = [None, *(base.bind(random_variant(weights, seed=seed)) for seed in range(3))]
    steps = [_tokens((3, 20, 1, 7)), _tokens((1, 1, 9, 1))]
    batch = Sequences(base, variants)
    found = [batch.step(step) for step in steps]
    for i, variant in enumerate(variants):
        # The second decoder has a KV cache of its own; the variant is bound there too.
        other = _decoder(config, weights, team, dtype=getattr(torch, dtype), quantization=quantization)
        alone = Sequences(other, [None if variant is None else other.bind(random_variant(weights, seed=i - 1))])
        for step, results in zip(steps, found, strict=True):
            assert torch.equal(results[i], *alone.step([step[i]]))


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", None), ("bfloat16", "int8")])
def test_rounded_weights_take_the_same_terms(dtype: str, quantization: str | None, team: Team) -> None:
    """The terms, rounded themselves, against the merged checkpoint of what the base's weights were rounded to."""
    config, weights = _model("llama")
    base = _decoder(config, weights, team, dtype=getattr(torch, dtype), quantization=quantization)
    rounded = weights | {
        name: base.base_weight(name.removesuffix(".weight")) for name, weight in weights.items() if weight.ndim == 2
    }
    terms = random_variant(weights, seed=1)
    terms = dataclasses.replace(terms, embeddings={})
    tokens = _tokens((20,))
    (found,) = Sequences(base, [base.bind(terms)]).step(tokens)
    (expected,) = Sequences(_decoder(config, merged_weights(rounded, terms), team), [None]).step(tokens)
    (without,) = Sequences(base, [None]).step(tokens)
    assert (found - expected).abs().mean() < 0.05 * (without - expected).abs().mean()


def _signs_everywhere(weights: Weights, *, seed: int, tied: bool) -> VariantTerms:
    """A delta of planes for all matrices; a tied head has those of the embedding."""
    torch.manual_seed(seed)
    linears, experts = {}, {}
    for name, weight in weights.items():
        if weight.ndim == 3:
            experts[name] = {expert: linear_terms(weight[expert], "signs") for expert in range(len(weight))}
        elif weight.ndim == 2:
            linears[name.removesuffix(".weight")] = linear_terms(weight, "signs")
    signs = linears.pop(EMBEDDING).signs
    if tied:
        linears[HEAD] = LinearTerms(signs=signs)
    return VariantTerms(f"sha256:{seed}", linears, experts, {EMBEDDING: EmbeddingTerms(signs=signs)})


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "mixtral"])
def test_answers_of_a_delta_are_those_of_its_checkpoint(family: str, best_kernels: KernelLibrary) -> None:
    """Greedy tokens, generated one by one after prompts that are shorter and longer than 16 tokens."""
    config, weights = _model(family)
    team = Team(best_kernels, 2)
    base = _decoder(config, weights, team)
    deltas = [_signs_everywhere(weights, seed=seed, tied=config["tie_word_embeddings"]) for seed in range(2)]
    prompts = _tokens((5, 30, 17))
    batch = Sequences(base, [base.bind(deltas[0]), base.bind(deltas[1]), None])
    references = [
        Sequences(_decoder(config | {"tie_word_embeddings": False}, merged_weights(weights, delta), team), [None])
        for delta in (*deltas, VariantTerms("sha256:base"))
    ]
    tokens = prompts
    for _ in range(12):
        found = batch.step(tokens)
        expected = [reference.step([new])[0] for reference, new in zip(references, tokens, strict=True)]
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        tokens = [[int(logits[-1].argmax())] for logits in expected]
        assert tokens == [[int(logits[-1].argmax())] for logits in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_computed_again_in_a_long_segment_is_the_same_up_to_rounding(
    dtype: str, best_kernels: KernelLibrary
) -> None:
    """As after preemption: what was generated token by token becomes a prompt."""
    config, weights = _model("llama")
    base = _decoder(config, weights, Team(best_kernels, 2), dtype=getattr(torch, dtype))
    delta = base.bind(_signs_everywhere(weights, seed=0, tied=False))
    (tokens,) = _tokens((40,))
    one_by_one = Sequences(base, [delta])
    alone = torch.cat([one_by_one.step([[token]])[0] for token in tokens])
    (together,) = Sequences(base, [delta]).step([tokens])
    if dtype == "float32":
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone.argmax(dim=1), together.argmax(dim=1))


def test_a_tied_head_has_the_planes_of_the_embedding(best_kernels: KernelLibrary) -> None:
    config, weights = _model("llama-tied")
    base = _decoder(config, weights, Team(best_kernels, 1))
    bound = base.bind(_signs_everywhere(weights, seed=0, tied=True))
    assert bound.embedding is not None
    assert bound.embedding.signs is not None
    blocks = [linear.signs.blocks.data_ptr() for linear in bound.linears.values() if linear.signs is not None]
    assert bound.embedding.signs.blocks.data_ptr() in blocks


def test_biases_where_the_base_has_none(team: Team) -> None:
    config, weights = _model("llama")
    torch.manual_seed(0)
    names = [
        name.removesuffix(".weight") for name, weight in weights.items() if weight.ndim == 2 and ".layers." in name
    ]
    biases = {name: torch.randn(len(weights[f"{name}.weight"])) for name in names}
    terms = VariantTerms("sha256:0", {name: LinearTerms(bias=bias) for name, bias in biases.items()})
    base = _decoder(config, weights, team)
    biased = weights | {f"{name}.bias": bias for name, bias in biases.items()}
    expected = _decoder(config | {"attention_bias": True, "mlp_bias": True}, biased, team)
    tokens = _tokens((9,))
    (found,) = Sequences(base, [base.bind(terms)]).step(tokens)
    torch.testing.assert_close(found, *Sequences(expected, [None]).step(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_weights(family: str, team: Team) -> None:
    config, weights = _model(family)
    base = _decoder(config, weights, team)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2:
            assert torch.equal(base.base_weight(module), weight)
        elif weight.ndim == 3:
            for expert, matrix in enumerate(weight):
                assert torch.equal(base.base_weight(f"{name}.{expert}"), matrix)
        else:
            with pytest.raises(KeyError):
                base.base_weight(module)
    assert torch.equal(base.base_weight(HEAD), weights.get(f"{HEAD}.weight", weights[f"{EMBEDDING}.weight"]))
    with pytest.raises(KeyError):
        base.base_weight("model.layers.0.self_attn.z_proj")


def test_more_rows_of_logits_than_are_computed_at_once(team: Team) -> None:
    config, weights = _model("llama")
    base = _decoder(config, weights, team)
    head = weights[f"{HEAD}.weight"]
    terms = [VariantTerms("sha256:0", {HEAD: linear_terms(head, "low rank")}) for _ in range(2)]
    first, second = map(base.bind, terms)
    hidden = torch.randn(150, head.shape[1])
    found = base.logits(hidden, (VariantSegment(10, 70, first), VariantSegment(70, 140, second)))
    expected = hidden @ head.T
    for rows, each in ((slice(10, 70), terms[0]), (slice(70, 140), terms[1])):
        expected[rows] = hidden[rows] @ merge_linear(head, None, each.linears[HEAD])[0].T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_variant_is_one_piece_of_memory(team: Team) -> None:
    config, weights = _model("llama")
    base = _decoder(config, weights, team)
    terms = random_variant(weights, seed=0)
    bound = base.bind(terms)
    assert bound.num_bytes < 2 * terms.num_bytes
    tensors = [linear.a for linear in bound.linears.values() if linear.a is not None]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


@pytest.mark.parametrize(
    "linears",
    [
        {"model.layers.0.self_attn.q_proj": LinearTerms(input_scale=torch.ones(32))},
        {"model.layers.0.mlp.down_proj": LinearTerms(torch.ones(1, 48), torch.ones(32, 1), input_scale=torch.ones(48))},
        {"model.layers.0.self_attn.z_proj": LinearTerms(bias=torch.ones(32))},
        {EMBEDDING: LinearTerms(bias=torch.ones(32))},
    ],
)
def test_what_has_no_place_is_refused(linears: dict[str, LinearTerms], team: Team) -> None:
    config, weights = _model("llama")
    base = _decoder(config, weights, team)
    with pytest.raises(UnsupportedModelError, match="--model-impl transformers"):
        base.bind(VariantTerms("sha256:0", linears))
    with pytest.raises(UnsupportedModelError, match="--model-impl transformers"):
        base.bind(VariantTerms("sha256:0", vectors={"model.layers.0.self_attn.q_proj.weight": torch.ones(32)}))


def test_a_trace_has_the_operations_of_variants(best_kernels: KernelLibrary) -> None:
    config, weights = _model("mixtral")
    base = _decoder(config, weights, Team(best_kernels, 1))
    sequences = Sequences(base, [base.bind(random_variant(weights, seed=0)), None])
    with base.trace() as rows:
        sequences.step([[1, 2], [3]])
    kinds = [row.kind for row in rows]
    num_layers = len(base.spec.layers)
    # Before qkv, output, router, gate and up, down of each layer, and the head; after the embedding.
    assert kinds.count(OpKind.LORA) == 5 * num_layers + 2
