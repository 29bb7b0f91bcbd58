"""The small real model in float32 gives transformers' greedy tokens, however the work is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model_worker.engine import model_runner
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.llm import LLM
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.model_runners import load_as_on_gpus

GREEDY = SamplingParams(temperature=0.0, max_tokens=60)

SETTINGS = {
    "together": EngineConfig(model_impl="native"),
    "transformers": EngineConfig(model_impl="transformers"),
    "as on GPUs": EngineConfig(model_impl="native"),
    "alone": EngineConfig(scheduler=SchedulerConfig(max_num_seqs=1)),
    "in chunks": EngineConfig(scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=24)),
    "preempted": EngineConfig(cache=CacheConfig(block_size=8, num_blocks=14, enable_prefix_caching=False)),
    "swapped": EngineConfig(
        cache=CacheConfig(block_size=8, num_blocks=14, enable_prefix_caching=False, swap_space_gib=0.05)
    ),
}
SCARCE = ("preempted", "swapped")


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_those_of_transformers(
    setting: str, smollm2_dir: Path, smollm2_greedy: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting == "as on GPUs":
        monkeypatch.setattr(model_runner, "load_model", load_as_on_gpus)
    llm = LLM(smollm2_dir, SETTINGS[setting], dtype="float32", max_model_len=256)
    template = llm.plan.chat_template
    assert template is not None
    prompts = [
        llm.engine.tokenizer.encode(template.render([{"role": "user", "content": question}]), add_special_tokens=False)
        for question in smollm2_greedy
    ]
    assert [len(prompt) for prompt in prompts] == [expected["prompt_len"] for expected in smollm2_greedy.values()]
    first = llm.generate(prompts, GREEDY)
    assert [answer.outputs[0].token_ids for answer in first] == [answer["ids"] for answer in smollm2_greedy.values()]
    assert (llm.engine.stats().preemptions_total > 0) == (setting in SCARCE)
    assert (llm.engine.stats().swapped_in_blocks_total > 0) == (setting == "swapped")

    again = llm.generate(prompts, GREEDY)  # the prompts' full blocks now come from the prefix cache, where it is on
    assert [answer.outputs[0].token_ids for answer in again] == [answer["ids"] for answer in smollm2_greedy.values()]
    assert all((answer.num_cached_tokens > 0) == (setting not in SCARCE) for answer in again)
    llm.engine.check_integrity()


def test_one_conversation_offline(smollm2_dir: Path, smollm2_greedy: dict[str, dict[str, Any]]) -> None:
    llm = LLM(smollm2_dir, dtype="float32", max_model_len=256)
    question = "What is the capital of France?"
    answer = llm.chat([{"role": "user", "content": question}], GREEDY)
    assert answer.outputs[0].text == smollm2_greedy[question]["text"].removesuffix("<|im_end|>")
    assert answer.outputs[0].finish_reason == "stop"
