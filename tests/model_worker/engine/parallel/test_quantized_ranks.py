"""Quantized weights, divided at their groups: the ranks compute with the same numbers as one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.load_plan import LoadPlan
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.sampling_params import SamplingParams
from registry.errors import UnsupportedModelError
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.divided_models import divided_runner
from tests.fakes.model_runners import make_runner
from tests.fakes.tiny_models import MAX_MODEL_LEN, VOCAB_SIZE, make_tiny_plan


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _config(size: int) -> EngineConfig:
    return EngineConfig(
        cache=CacheConfig(num_blocks=64),
        scheduler=SchedulerConfig(max_num_batched_tokens=32, max_num_seqs=4),
        model_impl="native",
        tensor_parallel_size=size,
    )


def _plan(path: Path, quantization: str, *, intermediate_size: int = 128) -> LoadPlan:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(path)
    return replace(make_tiny_plan(path), quantization=quantization)


def _tokens(runner: ModelRunner) -> list[int]:
    engine = LLMEngine(EngineConfig(), runner, ByteTokenizer(), stop_token_ids=(), max_model_len=MAX_MODEL_LEN)
    engine.add_request("0", list(range(3, 60, 2)), SamplingParams(temperature=0.0, max_tokens=16))
    tokens: list[int] = []
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            tokens += [token for delta in output.deltas for token in delta.token_ids]
    return tokens


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_two_ranks_give_the_tokens_of_one(quantization: str, tmp_path: Path) -> None:
    plan = _plan(tmp_path, quantization)
    expected = _tokens(make_runner("gpu", plan, _config(1), None))
    with divided_runner(plan, _config(2)) as runner:
        assert _tokens(runner) == expected


def test_groups_that_would_be_cut_are_refused(tmp_path: Path) -> None:
    plan = _plan(tmp_path, "int8", intermediate_size=96)  # 3 groups of inputs of the down projection
    with (
        pytest.raises(UnsupportedModelError, match=r"3 groups of 32 neurons cannot be divided among 2"),
        divided_runner(plan, _config(2)),
    ):
        pass
