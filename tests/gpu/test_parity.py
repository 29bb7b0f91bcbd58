"""Every family on a real GPU: greedy tokens of transformers on the same card, and logits as near to exact ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.models.gpu_decoder import GpuDecoder
from tests.fakes.tiny_models import TINY_MODELS, build_tiny_model
from tests.gpu.device import DEVICE
from tests.gpu.engines import generated, greedy, logprobs_of, make_llm, prompt_logprobs, random_prompts

NUM_NEW_TOKENS = 24
PROMPT_LENGTHS = (5, 17, 70, 33, 48)
MIXTURES = ("mixtral", "qwen3_moe")
OWN = [name for name, model in TINY_MODELS.items() if model.model_type in NATIVE_MODEL_TYPES]
# Its attention and transformers' are rounded in other places, and so are the products: as far apart as those two are.
_SPREAD = 1.5


@pytest.mark.parametrize("name", TINY_MODELS)
def test_greedy_tokens_in_float32(name: str, tmp_path: Path) -> None:
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path)
    model.to(DEVICE)
    prompts = random_prompts(PROMPT_LENGTHS)
    expected = [generated(model, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    for impl in ("auto", "transformers") if name in OWN else ("transformers",):
        # Prompts are computed in chunks, and not all at once.
        llm = make_llm(tmp_path, impl=impl, max_num_batched_tokens=48, max_num_seqs=4)
        assert greedy(llm, prompts, NUM_NEW_TOKENS) == expected, impl


@pytest.mark.parametrize("name", [name for name in OWN if name not in MIXTURES])  # they may choose another expert
def test_bfloat16_is_as_exact_as_transformers(name: str, tmp_path: Path) -> None:
    """Logprobs of a prompt's tokens: their mean square distance from those of the same weights in float32."""
    exact = build_tiny_model(name)
    for weight in exact.parameters():  # to what both have; `exact.bfloat16()` would round rotary frequencies too
        weight.data.copy_(weight.bfloat16())
    exact.save_pretrained(tmp_path)
    exact.to(DEVICE)
    prompt = random_prompts([200])[0]
    expected = logprobs_of(exact, prompt)
    distances = []
    for attention in ("eager", "sdpa") if exact._supports_sdpa else ("eager",):
        load: Any = type(exact).from_pretrained
        theirs = load(tmp_path, dtype=torch.bfloat16, attn_implementation=attention).to(DEVICE)
        distances.append((logprobs_of(theirs, prompt) - expected).square().mean().sqrt())
    distance = (prompt_logprobs(make_llm(tmp_path, dtype="bfloat16"), prompt) - expected).square().mean().sqrt()
    assert distance <= _SPREAD * max(distances), (distance, distances)


@pytest.mark.parametrize("name", ["llama-tied", *MIXTURES])
def test_the_own_decoder_is_what_is_compared(name: str, tmp_path: Path) -> None:
    build_tiny_model(name).save_pretrained(tmp_path)
    assert isinstance(make_llm(tmp_path).engine._steps._executor.model, GpuDecoder)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_float8_keys_and_values_change_little(name: str, tmp_path: Path) -> None:
    model = build_tiny_model(name)
    model.save_pretrained(tmp_path)
    prompt = random_prompts([150])[0]
    plain = prompt_logprobs(make_llm(tmp_path, dtype="bfloat16"), prompt)
    small = prompt_logprobs(make_llm(tmp_path, dtype="bfloat16", kv_cache_dtype="float8_e4m3fn"), prompt)
    assert not torch.equal(plain, small)
    assert (plain - small).abs().mean() < 0.3
