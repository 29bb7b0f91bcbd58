"""Tokens of the whole engine with adapters, base and adapters in one batch, equal those of PEFT."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig
from torch import nn
from transformers import PreTrainedModel

from delta.peft.compose import compose
from delta.peft.reader import read_peft_adapter
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.adapters_of_model import make_lora_manager
from model_worker.engine.lora.bound_variant import VariantHost
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.model_runners import make_runner
from tests.fakes.peft_adapters import TinyBase, make_adapter, merged_model
from tests.fakes.tiny_models import MAX_MODEL_LEN, TINY_MODELS, VOCAB_SIZE, build_tiny_model, make_tiny_plan
from tests.fakes.variants_of_engines import add_variant, run_to_end

NUM_NEW_TOKENS = 12
ALL_LINEAR = "all-linear"
CONFIGS = {
    "attention": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=8, lora_alpha=4, target_modules=ALL_LINEAR, use_rslora=True, task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, lora_alpha=4, target_modules=ALL_LINEAR, use_dora=True, task_type="CAUSAL_LM"),
    "everywhere": LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip
NAMES = ("llama", "qwen2", "qwen3")
CASES = [(name, impl) for name in NAMES for impl in ("native", "gpu", "transformers")]
OTHERS = {
    "biases": LoraConfig(r=2, target_modules=ALL_LINEAR, bias="all", task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}
OTHER_CASES = [
    *(
        (name, impl, ("biases", "ia3"))
        for name in ("llama-tied", "qwen2")
        for impl in ("native", "gpu", "transformers")
    ),
    ("qwen3_moe", "native", ("attention",)),
    ("qwen3_moe", "transformers", ("attention",)),
    *(("gemma2", impl, ("rslora", "dora")) for impl in ("native", "gpu")),
    ("phi3", "gpu", ("rslora",)),
    *((name, "transformers", ("rslora",)) for name in ("gpt2", "gpt_neox", "phi3", "gemma2")),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """Without a cache, so that nothing is shared with what is tested."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_NEW_TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _logprobs(model: nn.Module, prompt: list[int]) -> torch.Tensor:
    """Of each token of the prompt but the first. -> [len(prompt) - 1]"""
    ids = torch.tensor(prompt)
    with torch.inference_mode():
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(dim=1)
    return logprobs[:-1].gather(1, ids[1:, None]).squeeze(1)


def _engine(path: Path, impl: str, kernels: KernelLibrary, *, budget: int) -> LLMEngine:
    config = EngineConfig(
        cache=CacheConfig(block_size=8, num_blocks=64),
        scheduler=SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=6),
    )
    runner = make_runner(impl, make_tiny_plan(path), config, kernels)
    assert isinstance(runner.model, VariantHost)
    return LLMEngine(
        config,
        runner,
        ByteTokenizer(),
        stop_token_ids=(),
        max_model_len=MAX_MODEL_LEN,
        loras=make_lora_manager(config.lora, runner.model, base_digest=""),
    )


@pytest.mark.parametrize("budget", [512, 16])
@pytest.mark.parametrize(("name", "impl"), CASES)
def test_base_and_adapters_in_one_batch_equal_peft(
    name: str, impl: str, budget: int, best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    _check(name, impl, CONFIGS, best_kernels, tmp_path, budget=budget)


@pytest.mark.parametrize(("name", "impl", "adapters"), OTHER_CASES)
def test_other_kinds_and_families_equal_peft_too(
    name: str, impl: str, adapters: tuple[str, ...], best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    configs = {adapter: {**CONFIGS, **OTHERS}[adapter] for adapter in adapters}
    _check(name, impl, configs, best_kernels, tmp_path, budget=32)


def _check(
    name: str, impl: str, configs: Mapping[str, PeftConfig], kernels: KernelLibrary, path: Path, *, budget: int
) -> None:
    """Each request twice, with and without the logprobs of its prompt."""
    assert impl == "transformers" or TINY_MODELS[name].model_type in NATIVE_MODEL_TYPES
    model = build_tiny_model(name)
    model.save_pretrained(path / "base")
    engine = _engine(path / "base", impl, kernels, budget=budget)
    generator = random.Random(3)
    shared = [generator.randrange(VOCAB_SIZE) for _ in range(21)]
    references: dict[str, nn.Module] = {"base": model}
    for number, (adapter, config) in enumerate(configs.items()):
        references[adapter] = make_adapter(model, config, path / adapter, seed=number)
        add_variant(engine, adapter, path / adapter)
    for adapter in references:
        loras = [] if adapter == "base" else [LoraWeight(adapter)]
        for kind, prompt_logprobs in (("known", 0), ("plain", None)):
            sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, prompt_logprobs=prompt_logprobs)
            engine.add_request(f"{adapter} {kind}", shared, sampling, loras=loras)
    tokens, logprobs = run_to_end(engine)
    for adapter, reference in references.items():
        expected = _greedy(reference, shared)
        assert tokens[f"{adapter} known"] == tokens[f"{adapter} plain"] == expected, adapter
        torch.testing.assert_close(logprobs[f"{adapter} known"], _logprobs(reference, shared), rtol=1e-4, atol=1e-4)
    assert len({tuple(tokens[f"{adapter} plain"]) for adapter in references}) > 1


@pytest.mark.parametrize(("name", "impl"), CASES[:3])
def test_combinations_equal_the_sum_of_the_updates(
    name: str, impl: str, best_kernels: KernelLibrary, tmp_path: Path
) -> None:
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    engine = _engine(tmp_path / "base", impl, best_kernels, budget=64)
    weights = [LoraWeight("attention", 0.5), LoraWeight("everywhere", -1.5)]
    for number, (adapter, _) in enumerate(weights):
        make_adapter(model, CONFIGS[adapter], tmp_path / adapter, seed=number)
        add_variant(engine, adapter, tmp_path / adapter)
    prompt = list(range(15))
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, prompt_logprobs=0)
    engine.add_request("both", prompt, sampling, loras=weights)
    engine.add_request("base", prompt, sampling)
    tokens, logprobs = run_to_end(engine)
    expected = _combined(model, tmp_path, weights)
    assert tokens["both"] == _greedy(expected, prompt)
    assert tokens["base"] == _greedy(model, prompt)
    torch.testing.assert_close(logprobs["both"], _logprobs(expected, prompt), rtol=1e-4, atol=1e-4)


def _combined(model: PreTrainedModel, path: Path, weights: list[LoraWeight]) -> PreTrainedModel:
    base = TinyBase(model)
    return merged_model(model, compose([(read_peft_adapter(path / lora.name, base), lora.scale) for lora in weights]))
