"""Fine-tunes with tokens that their base does not have, served from their deltas, answer as when these are applied."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from delta.apply import apply_delta
from delta.codecs.policy import CodecPolicy
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.lora.adapters_of_model import make_lora_manager
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import InvalidRequestError
from tests.delta.models import make
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.model_runners import make_runner
from tests.fakes.peft_adapters import make_adapter
from tests.fakes.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, build_tiny_model, make_tiny_plan, with_more_tokens
from tests.fakes.variants_of_engines import add_variant

NUM_NEW_TOKENS = 12
VARIANTS = {
    "sign": (3, CodecPolicy("sign", ("lowrank",), rank=4)),
    "lossless": (3, CodecPolicy("lossless")),
    "sparse": (20, CodecPolicy("sparse")),
    "dense": (1, CodecPolicy("dense")),
    "plain": (0, CodecPolicy("sign")),
}
"""Name: number of tokens that the base does not have, codec."""
SAMPLED = SamplingParams(temperature=1.5, top_k=VOCAB_SIZE + 1, seed=3, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _engine(path: Path, impl: str, kernels: KernelLibrary) -> LLMEngine:
    config = EngineConfig(
        cache=CacheConfig(block_size=8, num_blocks=96),
        scheduler=SchedulerConfig(max_num_batched_tokens=48, max_num_seqs=16),
    )
    runner = make_runner(impl, make_tiny_plan(path), config, kernels)
    loras = make_lora_manager(config.lora, runner.model, base_digest="")
    return LLMEngine(config, runner, ByteTokenizer(), stop_token_ids=(), max_model_len=MAX_MODEL_LEN, loras=loras)


def _fine_tune(model: PreTrainedModel, num_tokens: int, seed: int, path: Path) -> Path:
    tuned = with_more_tokens(model, num_tokens, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.5
            parameter += noise * (torch.rand(parameter.shape, generator=generator) < 0.2)
    tuned.save_pretrained(path)
    return path


def _prepare(name: str, path: Path, kernels: KernelLibrary, impl: str) -> tuple[LLMEngine, dict[str, Path]]:
    """An engine of the base beside all variants and an adapter, and the variants as checkpoints."""
    model = build_tiny_model(name)
    model.save_pretrained(path / "base")
    engine = _engine(path / "base", impl, kernels)
    applied = {"base": path / "base"}
    for seed, (variant, (num_tokens, policy)) in enumerate(VARIANTS.items()):
        target = _fine_tune(model, num_tokens, seed, path / f"target-{variant}")
        make(path / "base", target, path / variant, policy)
        apply_delta(path / "base", path / variant, path / f"applied-{variant}")
        applied[variant] = path / f"applied-{variant}"
        add_variant(engine, variant, path / variant)
    make_adapter(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), path / "lora")
    add_variant(engine, "lora", path / "lora")
    return engine, applied


def _prompt(name: str, num_tokens: int) -> list[int]:
    """With every token that the base does not have."""
    source = random.Random(name)
    prompt = [source.randrange(VOCAB_SIZE) for _ in range(20)] + list(range(VOCAB_SIZE, VOCAB_SIZE + num_tokens))
    source.shuffle(prompt)
    return prompt


class _Answers:
    def __init__(self, engine: LLMEngine) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, torch.Tensor] = {}
        self.top: dict[str, list[dict[int, float]]] = {}
        while engine.has_unfinished_requests:
            for output in engine.step():
                assert output.error is None, output.error
                name = output.request_id
                if output.prompt_logprobs is not None:
                    self.logprobs[name] = torch.tensor([e.logprob for e in output.prompt_logprobs if e is not None])
                for delta in output.deltas:
                    self.tokens.setdefault(name, []).extend(delta.token_ids)
                    for entry in delta.logprobs or ():
                        self.top.setdefault(name, []).append({top.token_id: top.logprob for top in entry.top})
        engine.check_integrity()


def _greedy(model: nn.Module, prompt: Sequence[int]) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Tokens; logprobs of the prompt's tokens but the first; all logprobs of the first new token."""
    tokens = list(prompt)
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([prompt])).logits[0].float().log_softmax(dim=1)
        for _ in range(NUM_NEW_TOKENS):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    of_prompt = logprobs[:-1].gather(1, torch.tensor(prompt)[1:, None]).squeeze(1)
    return tokens[len(prompt) :], of_prompt, logprobs[-1]


@pytest.mark.parametrize("impl", ["native", "gpu", "transformers"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "mixtral"])
def test_served_unapplied_equals_applied(name: str, impl: str, best_kernels: KernelLibrary, tmp_path: Path) -> None:
    _check(name, impl, best_kernels, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "phi", "cohere2"])
def test_other_families(name: str, best_kernels: KernelLibrary, tmp_path: Path) -> None:
    _check(name, "transformers", best_kernels, tmp_path)


def _check(name: str, impl: str, kernels: KernelLibrary, path: Path) -> None:
    """Greedy with logprobs, and drawn; base, adapter and all variants in one batch."""
    engine, applied = _prepare(name, path, kernels, impl)
    prompts = {variant: _prompt(variant, VARIANTS.get(variant, (0,))[0]) for variant in (*applied, "lora")}
    known = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, prompt_logprobs=0, logprobs=5, ignore_eos=True)
    for variant, prompt in prompts.items():
        loras = [] if variant == "base" else [LoraWeight(variant)]
        engine.add_request(variant, prompt, known, loras=loras)
        engine.add_request(f"{variant} drawn", prompt, SAMPLED, loras=loras)
    found = _Answers(engine)
    emitted: set[str] = set()
    for variant, directory in applied.items():
        model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        tokens, logprobs, first = _greedy(model, prompts[variant])
        assert found.tokens[variant] == tokens, variant
        torch.testing.assert_close(found.logprobs[variant], logprobs, rtol=1e-3, atol=1e-3)
        top = torch.tensor(list(found.top[variant][0].items()))
        torch.testing.assert_close(top[:, 1], first[top[:, 0].long()], rtol=1e-3, atol=1e-3)
        assert sorted(top[:, 0].tolist()) == sorted(first.topk(5).indices.tolist())
        if max(tokens) >= VOCAB_SIZE:
            emitted.add(variant)
    assert emitted, "no variant has said one of its tokens"
    assert "base" not in emitted
    _check_drawn(found, prompts, applied, impl, kernels)


def _check_drawn(
    found: _Answers, prompts: dict[str, list[int]], applied: dict[str, Path], impl: str, kernels: KernelLibrary
) -> None:
    """Each alone, in an engine that has the applied delta as its model."""
    for variant in ("base", "sign", "sparse"):
        config = json.loads((applied[variant] / "config.json").read_text())
        assert config["vocab_size"] == VOCAB_SIZE + VARIANTS.get(variant, (0,))[0]
        engine = _engine(applied[variant], impl, kernels)
        engine.add_request("drawn", prompts[variant], SAMPLED)
        assert found.tokens[f"{variant} drawn"] == _Answers(engine).tokens["drawn"], variant


@pytest.mark.parametrize("impl", ["native", "gpu", "transformers"])
def test_tokens_beyond_a_vocabulary_are_refused(impl: str, best_kernels: KernelLibrary, tmp_path: Path) -> None:
    engine, _ = _prepare("llama-tied", tmp_path, best_kernels, impl)
    last = {"base": VOCAB_SIZE - 1, "sign": VOCAB_SIZE + 2, "sparse": VOCAB_SIZE + 19, "plain": VOCAB_SIZE - 1}
    for variant, token in last.items():
        loras = [] if variant == "base" else [LoraWeight(variant)]
        sampling = SamplingParams(max_tokens=1, logit_bias={token: 1.0}, stop_token_ids=(token,))
        engine.add_request(variant, [1, token], sampling, loras=loras)
        for refused in (
            ([1, token + 1], SamplingParams(max_tokens=1)),
            ([1], SamplingParams(max_tokens=1, logit_bias={token + 1: 1.0})),
            ([1], SamplingParams(max_tokens=1, stop_token_ids=(token + 1,))),
        ):
            with pytest.raises(InvalidRequestError, match=rf"outside 0\.\.{token}\b"):
                engine.add_request("refused", *refused, loras=loras)
    assert _Answers(engine).tokens.keys() == last.keys()


@pytest.mark.parametrize("impl", ["native", "gpu", "transformers"])
def test_a_reply_ends_with_a_token_of_its_own(impl: str, best_kernels: KernelLibrary, tmp_path: Path) -> None:
    """Forced by a bias, masked before the fewest tokens, and drawn again by n choices that fork."""
    engine, _ = _prepare("llama", tmp_path, best_kernels, impl)
    end = VOCAB_SIZE + 2
    biased = {"temperature": 0.0, "logit_bias": {end: 100.0}, "stop_token_ids": (end,), "max_tokens": 8}
    engine.add_request("at once", [1, 2, 3], SamplingParams(**biased), loras=[LoraWeight("sign")])  # type: ignore[arg-type]
    engine.add_request(
        "later",
        [1, 2, 3],
        SamplingParams(**biased, min_tokens=4, n=2),
        loras=[LoraWeight("lossless")],  # type: ignore[arg-type]
    )
    engine.add_request("base", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=8))
    reasons: dict[tuple[str, int], str] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            for delta in output.deltas:
                tokens.setdefault((output.request_id, delta.index), []).extend(delta.token_ids)
                if delta.finish_reason is not None:
                    reasons[output.request_id, delta.index] = str(delta.finish_reason)
    assert tokens["at once", 0] == [end]
    for index in range(2):
        assert len(tokens["later", index]) == 5
        assert tokens["later", index][-1] == end
    assert reasons["at once", 0] == reasons["later", 0] == reasons["later", 1] != reasons["base", 0]
