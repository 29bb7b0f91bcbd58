"""Rows with variants in one batch of the GPU decoder are what transformers makes of checkpoints with them merged in."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from delta.merge_terms import merge_linear
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from model_worker.engine.lora.bound_variant import VariantSegment
from model_worker.engine.models import gpu_variants
from model_worker.engine.models.gpu_decoder import GpuDecoder
from registry.errors import InsufficientMemoryError, UnsupportedModelError
from tests.fakes.decoder_steps import MAX_MODEL_LEN, Sequences
from tests.fakes.random_variants import EMBEDDING, HEAD, Weights, linear_terms, merged_weights, random_variant
from tests.fakes.tiny_models import build_tiny_model

MIXTURES = ("mixtral", "qwen3_moe")
FAMILIES = (
    *("llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"),
    *MIXTURES,
)
KINDS = ("low rank", "scaled", "dense", "signs", "ternary and more", "sparse", "input")
CPU = torch.device("cpu")


def _model(family: str) -> tuple[PreTrainedModel, Weights]:
    model = build_tiny_model(family)
    return model, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _decoder(model: PreTrainedModel, weights: Mapping[str, Tensor], **options: Any) -> GpuDecoder:
    options = {"dtype": torch.float32, "device": CPU, "quantization": None, "max_model_len": MAX_MODEL_LEN, **options}
    decoder = GpuDecoder(model.config.to_dict(), **options)
    for name, _ in decoder.weights():
        decoder.fill(name, weights[name])
    decoder.finish()
    return decoder


def _reference(model: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    """transformers' model with these weights; its head is a matrix of its own."""
    config = type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": False})
    other: PreTrainedModel = type(model)(config).eval()
    other.set_attn_implementation("eager")
    other.load_state_dict({f"{HEAD}.weight": weights[f"{EMBEDDING}.weight"], **weights})
    return other


def _tokens(lengths: Sequence[int]) -> list[list[int]]:
    generator = random.Random(5)
    return [[generator.choice((3, 40, generator.randrange(128))) for _ in range(length)] for length in lengths]


def _check(model: PreTrainedModel, weights: Weights, terms: Sequence[VariantTerms | None]) -> None:
    """Prompts of several lengths in one step, chunks beside single tokens, then single tokens."""
    base = _decoder(model, weights)
    batch = Sequences(base, [None if each is None else base.bind(each) for each in terms])
    lengths = ((3, 20, 1, 7, 5), (1, 1, 9, 1, 1), (1, 1, 1, 1, 1))
    steps = [_tokens(each[: len(terms)]) for each in lengths]
    with torch.inference_mode():
        found = [batch.step(step) for step in steps]
        for i, each in enumerate(terms):
            merged = weights if each is None else merged_weights(weights, each)
            tokens = [token for step in steps for token in step[i]]
            expected = _reference(model, merged)(input_ids=torch.tensor([tokens])).logits[0]
            ours = torch.cat([results[i] for results in found])
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(ours.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_merged_checkpoints(family: str) -> None:
    model, weights = _model(family)
    _check(model, weights, [None, *(random_variant(weights, seed=seed) for seed in range(3)), None])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_term_alone(kind: str) -> None:
    model, weights = _model("llama-tied")
    torch.manual_seed(0)
    modules = [name.removesuffix(".weight") for name, weight in weights.items() if weight.ndim == 2]
    modules = [name for name in modules if name != EMBEDDING and (kind != "input" or name.endswith("o_proj"))]
    terms = {name: linear_terms(weights[f"{name}.weight"], kind) for name in modules}
    _check(model, weights, [VariantTerms("sha256:0", terms), None])


def test_biases_where_the_base_has_none_and_where_it_has() -> None:
    for family in ("llama", "qwen2"):
        model, weights = _model(family)
        torch.manual_seed(0)
        names = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]
        terms = {name: LinearTerms(bias=torch.randn(len(weights[f"{name}.weight"]))) for name in names}
        base = _decoder(model, weights)
        biases = {f"{name}.bias": linear.bias for name, linear in terms.items()}
        tokens = _tokens((9,))
        found = Sequences(base, [base.bind(VariantTerms("sha256:0", terms))]).step(tokens)
        changed = {name: bias + weights.get(name, torch.zeros(())) for name, bias in biases.items()}
        zeros = {f"{name}.bias": torch.zeros(len(weights[f"{name}.weight"])) for name in _attention_modules(weights)}
        config = model.config.to_dict() | {"attention_bias": True}
        expected = GpuDecoder(config, dtype=torch.float32, device=CPU, quantization=None, max_model_len=MAX_MODEL_LEN)
        for name, _ in expected.weights():
            expected.fill(name, (zeros | weights | changed)[name])
        expected.finish()
        torch.testing.assert_close(found, Sequences(expected, [None]).step(tokens), rtol=1e-4, atol=1e-4)


def _attention_modules(weights: Weights) -> list[str]:
    return [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight") and ".self_attn." in name]


def test_more_rows_of_logits_than_tokens_of_a_step() -> None:
    model, weights = _model("llama")
    base = _decoder(model, weights)
    head = weights[f"{HEAD}.weight"]
    terms = [VariantTerms("sha256:0", {HEAD: linear_terms(head, "low rank")}) for _ in range(2)]
    first, second = map(base.bind, terms)
    hidden = torch.randn(150, head.shape[1])
    with torch.inference_mode():
        found = base.logits(hidden, (VariantSegment(10, 70, first), VariantSegment(70, 140, second)))
    expected = hidden @ head.T
    for rows, each in ((slice(10, 70), terms[0]), (slice(70, 140), terms[1])):
        expected[rows] = hidden[rows] @ merge_linear(head, None, each.linears[HEAD])[0].T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_weights(family: str) -> None:
    model, weights = _model(family)
    base = _decoder(model, weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if name.endswith(".bias"):
            assert torch.equal(base.base_bias(name.removesuffix(".bias")), weight)
        elif weight.ndim == 2:
            assert torch.equal(base.base_weight(module), weight)
        elif weight.ndim == 3:
            assert torch.equal(base.base_weight(f"{name}.1"), weight[1])
        else:
            with pytest.raises(KeyError):
                base.base_weight(module)
    assert torch.equal(base.base_weight(HEAD), weights.get(f"{HEAD}.weight", weights[f"{EMBEDDING}.weight"]))
    with pytest.raises(KeyError):
        base.base_weight("model.layers.0.self_attn.z_proj")


@pytest.mark.parametrize(
    "terms",
    [
        VariantTerms("", {"model.layers.0.self_attn.q_proj": LinearTerms(input_scale=torch.ones(32))}),
        VariantTerms("", {"model.layers.0.self_attn.z_proj": LinearTerms(bias=torch.ones(32))}),
        VariantTerms("", {EMBEDDING: LinearTerms(bias=torch.ones(32))}),
        VariantTerms("", vectors={"model.layers.0.self_attn.q_proj.weight": torch.ones(32)}),
        VariantTerms("", experts={"model.layers.0.mlp.experts.down_proj": {}}),
        VariantTerms("", experts={"model.layers.0.mlp.down_proj.weight": {}}),
        VariantTerms("", embeddings={HEAD: EmbeddingTerms()}),
    ],
)
def test_what_has_no_place_is_refused(terms: VariantTerms) -> None:
    base = _decoder(*_model("llama"))
    with pytest.raises(UnsupportedModelError, match="--model-impl transformers"):
        base.bind(terms)


def test_a_number_is_free_again_when_nobody_holds_the_variant() -> None:
    base = _decoder(*_model("llama"), has_tables=True)
    terms = VariantTerms("", {HEAD: LinearTerms(bias=torch.ones(128))})
    first = base.bind(terms)
    number = first.number
    assert base.bind(terms).number != number
    del first
    assert base.bind(terms).number == number


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_term_in_experts(kind: str) -> None:
    """In some of them; such variants are served without graphs."""
    model, weights = _model("mixtral")
    torch.manual_seed(0)
    experts = {
        name: {expert: linear_terms(weight[expert], kind) for expert in (0, 2, 3)}
        for name, weight in weights.items()
        if weight.ndim == 3
    }
    terms = VariantTerms("sha256:0", experts=experts)
    _check(model, weights, [VariantTerms("sha256:1"), terms, None])
    with_tables = _decoder(model, weights, has_tables=True)
    variant = with_tables.bind(terms)
    for graph in with_tables.graph_terms(4):
        assert not graph.serves((VariantSegment(0, 2, variant),))


def test_too_many_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_variants, "_MAX_VARIANTS", 2)
    base = _decoder(*_model("llama"), has_tables=True)
    held = [base.bind(VariantTerms("")) for _ in range(2)]
    with pytest.raises(InsufficientMemoryError, match="--max-loras"):
        base.bind(VariantTerms(""))
    assert len(held) == 2
