"""Rows with variants in one batch are what transformers computes with the variants merged into the weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from delta.peft.base_model import model_shapes
from delta.peft.reader import read_peft_adapter
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from model_worker.engine.layers.linear import Linear, PackedMethod
from model_worker.engine.loader import load_model
from model_worker.engine.lora.bound_variant import VariantHost, VariantSegment
from model_worker.engine.lora.served_base import ServedBase
from model_worker.engine.models.transformers_model import TransformersModel
from model_worker.engine.models.transformers_variants import TransformersVariant
from registry.errors import UnsupportedModelError
from tests.fakes.decoder_steps import Sequences
from tests.fakes.peft_adapters import TinyBase, make_adapter, merged_model
from tests.fakes.shaped_variants import shaped_variant
from tests.fakes.tiny_models import TINY_MODELS, build_tiny_model, make_tiny_plan

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _load(reference: PreTrainedModel, path: Path, dtype: str = "float32") -> TransformersModel:
    reference.save_pretrained(path)
    model = load_model(make_tiny_plan(path, dtype=dtype), CPU, model_impl="transformers")
    assert isinstance(model, TransformersModel)
    assert isinstance(model, VariantHost)
    return model


def _tokens(lengths: Sequence[int]) -> list[list[int]]:
    source = random.Random(5)
    return [[source.choice((3, 40, source.randrange(128))) for _ in range(length)] for length in lengths]


@torch.no_grad()
def _logits(reference: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = reference(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_mixed_batch_equals_merged_models(name: str, tmp_path: Path) -> None:
    """Prompts of several lengths, then single tokens beside a second chunk, of the base and of three variants."""
    reference = build_tiny_model(name)
    model = _load(reference, tmp_path)
    shapes, model_type = model_shapes(reference), TINY_MODELS[name].model_type
    terms = [
        shaped_variant(shapes, seed=1, model_type=model_type, low_rank=True),
        shaped_variant(shapes, seed=2, model_type=model_type),
        shaped_variant(shapes, seed=3, model_type=model_type),
    ]
    bound = [model.bind(of_variant) for of_variant in terms]
    references = [reference, *(merged_model(reference, of_variant) for of_variant in terms)]
    of_sequence = [0, 0, 1, 2, 2, 3]
    sequences = _tokens([12, 9, 14, 11, 8, 20])
    rows = Sequences(model, [None if variant == 0 else bound[variant - 1] for variant in of_sequence])
    cuts = [(0, 11, 12), (0, 8, 9), (0, 13, 14), (0, 6, 11), (0, 7, 8), (0, 19, 20)]
    found: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(2):
        new = [tokens[cut[step] : cut[step + 1]] for tokens, cut in zip(sequences, cuts, strict=True)]
        for logits, of_step in zip(found, rows.step(new), strict=True):
            logits.append(of_step)
    for tokens, variant, logits in zip(sequences, of_sequence, found, strict=True):
        expected = _logits(references[variant], tokens)
        torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma2", "gpt_oss"])
def test_half_precision_is_near(name: str, dtype: str, tmp_path: Path) -> None:
    """Terms are rounded, and all kinds of modules take them."""
    reference = build_tiny_model(name)
    model = _load(reference, tmp_path, dtype)
    terms = shaped_variant(model_shapes(reference), seed=2, model_type=name)
    prompt, other = _tokens([12, 5])
    _, logits = Sequences(model, [None, model.bind(terms)]).step([other, prompt])
    expected = _logits(merged_model(reference, terms).to(getattr(torch, dtype)), prompt)
    assert logits.dtype == expected.dtype
    error = (logits - expected).float().norm() / expected.float().norm()
    assert error < 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma2"])
def test_a_row_does_not_depend_on_its_neighbours(name: str, tmp_path: Path) -> None:
    reference = build_tiny_model(name)
    model = _load(reference, tmp_path)
    shapes = model_shapes(reference)
    bound = [model.bind(shaped_variant(shapes, seed=seed, model_type=name)) for seed in (1, 2)]
    variants = [None, bound[0], bound[1], bound[1]]
    prompts, more = _tokens([7, 3, 9, 1]), [[5], [6], [7], [8]]
    together = Sequences(model, variants)
    steps = together.step(prompts), together.step(more)
    for i, variant in enumerate(variants):
        alone = Sequences(model, [variant])
        for step, tokens in zip(steps, (prompts, more), strict=True):
            (logits,) = alone.step([tokens[i]])
            torch.testing.assert_close(logits, step[i], rtol=1e-5, atol=1e-5)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Not after a step, nor after one that failed."""
    reference = build_tiny_model("qwen3_moe")
    model = _load(reference, tmp_path)
    bound = model.bind(shaped_variant(model_shapes(reference), seed=1, model_type="qwen3_moe"))
    before = Sequences(model, [None]).step([[1, 2, 3]])
    methods = [(module, module.method) for module in model.causal_lm.modules() if isinstance(module, Linear)]
    Sequences(model, [bound]).step([[1, 2, 3]])
    model.context.variants = (VariantSegment(0, 2, bound),)
    model.context.metadata = None
    with pytest.raises(AssertionError):
        model(torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert all(module.method is method for module, method in methods)
    assert not any("forward" in vars(module) for module in model.causal_lm.modules())
    assert torch.equal(Sequences(model, [None]).step([[1, 2, 3]])[0], before[0])


def test_the_base_s_weights_can_be_read(tmp_path: Path) -> None:
    """In whatever form they are kept."""
    reference = build_tiny_model("gpt2")
    model = _load(reference, tmp_path)
    base = TinyBase(reference)
    packed = model.causal_lm.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(packed, Linear)
    assert isinstance(packed.method, PackedMethod)
    for module in ("transformer.h.0.attn.c_attn", "lm_head", "transformer.wte"):
        assert torch.equal(model.base_weight(module), base.weight(module))
    assert torch.equal(model.base_bias("transformer.h.0.attn.c_attn"), base.bias("transformer.h.0.attn.c_attn"))
    with pytest.raises(KeyError):
        model.base_weight("transformer.h.0.attn.nothing")
    with pytest.raises(KeyError):
        model.base_weight("transformer.ln_f")
    with pytest.raises(KeyError):
        model.base_bias("lm_head")


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    reference = build_tiny_model("llama")
    model = _load(reference, tmp_path, "bfloat16")
    module = "model.layers.0.mlp.gate_proj"
    assert torch.equal(model.base_weight(module), TinyBase(reference).weight(module).bfloat16().float())


@pytest.mark.parametrize(
    ("name", "terms", "message"),
    [
        ("gpt_oss", {"vectors": {"model.layers.0.self_attn.sinks": torch.ones(4)}}, "self_attn.sinks"),
        (
            "llama4-chunked",
            {"experts": {"model.layers.1.feed_forward.experts.down_proj": {0: LinearTerms(bias=torch.ones(32))}}},
            "Llama4TextExperts cannot be computed",
        ),
        (
            "opt",
            {
                "embeddings": {
                    "model.decoder.embed_positions": EmbeddingTerms(a=torch.ones(1, 258), b=torch.ones(32, 1))
                }
            },
            "embed_positions",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(name: str, terms: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = _load(build_tiny_model(name), tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        model.bind(VariantTerms("sha256:0", **terms))


def test_bytes_are_those_of_what_was_made(tmp_path: Path) -> None:
    reference = build_tiny_model("llama")
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    terms = VariantTerms("sha256:0", {"model.layers.0.self_attn.q_proj": LinearTerms(a=a, b=b)})
    exact = _load(reference, tmp_path / "a").bind(terms)
    rounded = _load(reference, tmp_path / "b", "bfloat16").bind(terms)
    assert isinstance(exact, TransformersVariant)
    assert exact.num_bytes == 2 * rounded.num_bytes
    assert rounded.num_bytes == 2 * 2 * 4 * 32


_EVERY_LINEAR = {"target_modules": "all-linear", "r": 6, "lora_alpha": 12}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", LoraConfig(**_EVERY_LINEAR)),
        ("llama", LoraConfig(**_EVERY_LINEAR, use_dora=True, use_rslora=True)),
        ("llama", IA3Config(task_type="CAUSAL_LM")),
        ("llama-tied", LoraConfig(**_EVERY_LINEAR, trainable_token_indices=[3, 40], bias="all")),
        ("llama", LoraConfig(target_modules=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["norm"])),
        ("gpt2", LoraConfig(**_EVERY_LINEAR, fan_in_fan_out=True)),
        ("gpt2", LoraConfig(target_modules=["c_attn", "wte"], fan_in_fan_out=True, modules_to_save=["lm_head"])),
        ("gpt_neox", LoraConfig(**_EVERY_LINEAR)),
        ("falcon-new-arch", LoraConfig(**_EVERY_LINEAR)),
        ("bloom", LoraConfig(**_EVERY_LINEAR, lora_bias=True)),
        ("qwen2", LoraConfig(**_EVERY_LINEAR, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 40})),
        ("gemma2", LoraConfig(target_modules=["q_proj", "o_proj", "embed_tokens"], r=4)),
        ("opt", LoraConfig(**_EVERY_LINEAR)),
        ("qwen3_moe", LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], r=2)),
        ("mixtral", LoraConfig(target_modules=["v_proj"], target_parameters=["experts.down_proj"], r=3)),
        ("gpt_oss", LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], r=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_adapters_of_peft_give_what_peft_gives(name: str, config: Any, tmp_path: Path) -> None:
    """Logits of a prompt beside rows of the base, then greedy tokens one by one."""
    reference = build_tiny_model(name)
    adapted = make_adapter(reference, config, tmp_path / "adapter")
    model = _load(reference, tmp_path / "base")
    bound = model.bind(read_peft_adapter(tmp_path / "adapter", ServedBase(model, "")))
    prompt, other = _tokens([13, 7])
    tokens, base_tokens = list(prompt), list(other)
    rows = Sequences(model, [None, bound])
    base_logits, logits = rows.step([other, prompt])
    torch.testing.assert_close(logits, _logits(adapted, tokens), rtol=1e-4, atol=1e-4)
    for _ in range(8):
        tokens.append(int(logits[-1].argmax()))
        base_tokens.append(int(base_logits[-1].argmax()))
        base_logits, logits = rows.step([base_tokens[-1:], tokens[-1:]])
    assert tokens[len(prompt) :] == _logits(adapted, tokens)[len(prompt) - 1 : -1].argmax(dim=1).tolist()
    assert base_tokens[len(other) :] == _logits(reference, base_tokens)[len(other) - 1 : -1].argmax(dim=1).tolist()
