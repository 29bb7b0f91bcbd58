"""Fine-tunes served from their deltas, beside the base in one batch, answer as when the deltas are applied first."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from delta.apply import apply_delta
from delta.codecs.policy import CodecPolicy
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.adapters_of_model import make_lora_manager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.sampling_params import SamplingParams
from tests.delta.models import make
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.model_runners import make_runner
from tests.fakes.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, build_tiny_model, make_tiny_plan
from tests.fakes.variants_of_engines import add_variant, run_to_end, write_fine_tune

NUM_NEW_TOKENS = 10
POLICIES = {
    "sign": CodecPolicy("sign"),
    "residuals": CodecPolicy("sign", ("sign", "lowrank"), rank=4),
    "ternary": CodecPolicy("ternary"),
    "lowrank": CodecPolicy("lowrank", rank=4),
    "sparse": CodecPolicy("sparse"),
    "lossless": CodecPolicy("lossless"),
    "dense": CodecPolicy("dense"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("impl", ["native", "gpu", "transformers"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "mixtral", "qwen3_moe"])
def test_served_unapplied_equals_applied(name: str, impl: str, best_kernels: KernelLibrary, tmp_path: Path) -> None:
    _check(name, impl, best_kernels, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
def test_other_families(name: str, best_kernels: KernelLibrary, tmp_path: Path) -> None:
    _check(name, "transformers", best_kernels, tmp_path)


def _check(name: str, impl: str, kernels: KernelLibrary, path: Path) -> None:
    base = path / "base"
    build_tiny_model(name).save_pretrained(base)
    config = EngineConfig(
        cache=CacheConfig(block_size=8, num_blocks=64),
        scheduler=SchedulerConfig(max_num_batched_tokens=32, max_num_seqs=8),
    )
    runner = make_runner(impl, make_tiny_plan(base), config, kernels)
    loras = make_lora_manager(config.lora, runner.model, base_digest="")
    engine = LLMEngine(config, runner, ByteTokenizer(), stop_token_ids=(), max_model_len=MAX_MODEL_LEN, loras=loras)
    models: dict[str, nn.Module] = {"base": AutoModelForCausalLM.from_pretrained(base).eval()}
    for seed, (variant, policy) in enumerate(POLICIES.items()):
        target = write_fine_tune(base, path / f"target-{variant}", seed, share=0.1 if policy.codec != "dense" else 1)
        make(base, target, path / variant, policy)
        apply_delta(base, path / variant, path / f"applied-{variant}")
        models[variant] = AutoModelForCausalLM.from_pretrained(path / f"applied-{variant}").eval()
        add_variant(engine, variant, path / variant)
    source = random.Random(name)
    prompts = {variant: [source.randrange(VOCAB_SIZE) for _ in range(source.randint(5, 30))] for variant in models}
    for variant, prompt in prompts.items():
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, prompt_logprobs=0)
        engine.add_request(variant, prompt, sampling, loras=[] if variant == "base" else [LoraWeight(variant)])
    tokens, logprobs = run_to_end(engine)
    for variant, model in models.items():
        expected_tokens, expected_logprobs = _expected(model, prompts[variant])
        torch.testing.assert_close(logprobs[variant], expected_logprobs, rtol=1e-3, atol=1e-3)
        assert tokens[variant] == expected_tokens, variant


def _expected(model: nn.Module, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logprobs of the prompt's tokens but the first."""
    tokens = list(prompt)
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(dim=1)
        for _ in range(NUM_NEW_TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :], logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None]).squeeze(1)
