"""Variants of a model that is divided among two processes answer as those of the whole model do, all in one batch."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from transformers import PreTrainedModel

from delta.codecs.policy import CodecPolicy
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.sampling_params import SamplingParams
from tests.delta.models import make
from tests.fakes.divided_models import engine_of
from tests.fakes.peft_adapters import make_adapter
from tests.fakes.tiny_models import VOCAB_SIZE, build_tiny_model, make_tiny_plan, with_more_tokens
from tests.fakes.variants_of_engines import add_variant, run_to_end, write_fine_tune

ALL_LINEAR = "all-linear"
ADAPTERS: Mapping[str, Any] = {
    "attention": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "linear": LoraConfig(r=3, lora_alpha=4, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, lora_alpha=4, target_modules=ALL_LINEAR, use_dora=True, task_type="CAUSAL_LM"),
    "everywhere": LoraConfig(
        r=3, lora_alpha=6, target_modules=["o_proj", "down_proj", "embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    ),
    "biases": LoraConfig(r=2, target_modules=ALL_LINEAR, bias="all", task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "experts": LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip
DELTAS = {
    "residuals": CodecPolicy("sign", ("sign", "lowrank"), rank=4),
    "ternary": CodecPolicy("ternary"),
    "sparse": CodecPolicy("sparse"),
    "lossless": CodecPolicy("lossless"),
    "dense": CodecPolicy("dense"),
}
LLAMA = ("attention", "linear", "dora", "everywhere")
CASES = [
    ("llama", "transformers", LLAMA),
    ("llama", "native", LLAMA),
    ("llama-tied", "transformers", ("biases", "ia3")),
    ("llama-tied", "native", ("biases", "ia3")),
    ("phi3", "native", ("linear",)),
    ("gemma2", "native", ("linear", "dora")),
    *((name, "transformers", ("linear",)) for name in ("gpt2", "gpt_neox", "phi3", "qwen3")),
    *(("mixtral", impl, ("attention", "experts")) for impl in ("transformers", "native")),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _config(impl: str, size: int) -> EngineConfig:
    return EngineConfig(
        cache=CacheConfig(block_size=8, num_blocks=96),
        scheduler=SchedulerConfig(max_num_batched_tokens=32, max_num_seqs=8),
        model_impl=impl,
        tensor_parallel_size=size,
    )


def _answers(engine: LLMEngine, variants: Mapping[str, Path]) -> dict[str, list[int]]:
    """Greedy tokens of the base, of each variant, and of the first two that can be added up, computed together."""
    loras: dict[str, list[LoraWeight]] = {"base": []}
    for name, path in variants.items():
        add_variant(engine, name, path)
        loras[name] = [LoraWeight(name)]
    if {"attention", "linear"} <= variants.keys():
        loras["both"] = [LoraWeight("attention", 0.7), LoraWeight("linear", 0.4)]
    source = random.Random(3)
    for name in loras:
        prompt = [source.randrange(VOCAB_SIZE) for _ in range(source.randint(5, 30))]
        engine.add_request(
            name, prompt, SamplingParams(temperature=0.0, max_tokens=10, prompt_logprobs=0), loras=loras[name]
        )
    tokens, _ = run_to_end(engine)
    return tokens


def _check(base: Path, impl: str, variants: Mapping[str, Path]) -> None:
    with engine_of(make_tiny_plan(base), _config("transformers", 1)) as whole:
        expected = _answers(whole, variants)
    with engine_of(make_tiny_plan(base), _config(impl, 2)) as divided:
        assert _answers(divided, variants) == expected
    assert len(expected) == len({tuple(tokens) for tokens in expected.values()})  # the variants matter


@pytest.mark.parametrize(("name", "impl", "adapters"), CASES)
def test_adapters(name: str, impl: str, adapters: tuple[str, ...], tmp_path: Path) -> None:
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    for seed, adapter in enumerate(adapters):
        make_adapter(model, ADAPTERS[adapter], tmp_path / adapter, seed=seed)
    _check(tmp_path / "base", impl, {adapter: tmp_path / adapter for adapter in adapters})


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        ("llama", "transformers"),
        ("llama", "native"),
        ("llama-tied", "native"),
        ("olmo2", "native"),
        ("mixtral", "auto"),
    ],
)
def test_deltas(name: str, impl: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny_model(name).save_pretrained(base)
    for seed, (delta, policy) in enumerate(DELTAS.items()):
        target = write_fine_tune(
            base, tmp_path / f"target-{delta}", seed, share=1.0 if policy.codec == "dense" else 0.1
        )
        make(base, target, tmp_path / delta, policy)
    _check(base, impl, {delta: tmp_path / delta for delta in DELTAS})


@pytest.mark.parametrize("impl", ["transformers", "native"])
def test_tokens_that_the_base_does_not_have(impl: str, tmp_path: Path) -> None:
    base = build_tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    _with_noise(with_more_tokens(base, 5, seed=1), tmp_path / "tuned")
    make(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta", CodecPolicy("lossless"))
    answers = []
    for size in (1, 2):
        with engine_of(
            make_tiny_plan(tmp_path / "base"), _config("transformers" if size == 1 else impl, size)
        ) as engine:
            add_variant(engine, "delta", tmp_path / "delta")
            prompt = [VOCAB_SIZE + 4, 3, VOCAB_SIZE, 77]
            sampling = SamplingParams(temperature=0.0, max_tokens=10, logit_bias={VOCAB_SIZE + 2: 3.0})
            engine.add_request("0", prompt, sampling, loras=[LoraWeight("delta")])
            tokens: list[int] = []
            while engine.has_unfinished_requests:
                for output in engine.step():
                    assert output.error is None, output.error
                    tokens += [token for delta in output.deltas for token in delta.token_ids]
            answers.append(tokens)
    assert answers[0] == answers[1]


def test_ranks_forget_variants_that_are_gone(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    make_adapter(model, ADAPTERS["linear"], tmp_path / "linear")
    with engine_of(make_tiny_plan(tmp_path / "base"), _config("transformers", 2)) as engine:
        add_variant(engine, "linear", tmp_path / "linear")
        one = engine.loras.statuses()[0].host_bytes
        assert engine.loras.remove("linear").done()
        gc.collect()
        for again in range(3):  # the numbers of those that are gone are with the next request
            add_variant(engine, f"again-{again}", tmp_path / "linear")
        assert [status.host_bytes for status in engine.loras.statuses()] == [one] * 3


def _with_noise(model: PreTrainedModel, path: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape) * parameter.std() * 0.3
    model.save_pretrained(path)
