"""Engines on the GPU over tiny models, and what transformers makes of the same prompts there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm import LLM
from model_worker.engine.lora.lora_weight import LoraWeight
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.tiny_models import VOCAB_SIZE
from tests.gpu.device import DEVICE

NUM_BLOCKS = 512


def random_prompts(lengths: Sequence[int], seed: int = 7) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


def make_llm(
    path: Path,
    *,
    dtype: str = "float32",
    impl: str = "auto",
    eager: bool = False,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    kv_cache_dtype: str = "auto",
) -> LLM:
    """Of a tiny model that was saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    config = EngineConfig(
        cache=CacheConfig(
            num_blocks=NUM_BLOCKS, kv_cache_dtype=kv_cache_dtype, swap_space_gib=0.0, gpu_memory_utilization=0.1
        ),  # several processes share the GPU
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
        model_impl=impl,
        device=DEVICE,
        enforce_eager=eager,
    )
    return LLM(path, config, dtype=dtype)


def greedy(
    llm: LLM, prompts: Sequence[list[int]], num_tokens: int, loras: Sequence[str | None] | None = None
) -> list[list[int]]:
    """New tokens of each prompt, all computed together; with the adapter that is named for it."""
    engine = llm.engine
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        lora = None if loras is None else loras[row]
        engine.add_request(str(row), prompt, sampling, loras=() if lora is None else [LoraWeight(lora)])
    while engine.has_unfinished_requests:
        for news in engine.step():
            assert news.error is None, news.error
            for delta in news.deltas:
                tokens[int(news.request_id)] += delta.token_ids
        if engine.stalled:
            engine.wait_for_adapters()
    engine.check_integrity()
    return tokens


def prompt_logprobs(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Logprob of each token of a prompt but the first."""
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (answer,) = llm.generate([prompt], sampling)
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs or () if entry is not None])


def generated(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The greedy answer of transformers."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def logprobs_of(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """Logprob of each token of a prompt but the first, by transformers."""
    ids = torch.tensor(prompt, device=model.device)
    with torch.inference_mode():
        logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(dim=1)
    return logprobs[:-1].gather(1, ids[1:, None]).squeeze(1).cpu()
