"""Ranks as they are on GPUs, with CPU tensors: each replays its graphs, and steps run ahead of the tokens that rank 0
draws.
"""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig, SpeculationConfig
from model_worker.engine.llm_engine import LLMEngine
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.parallel import rank_process, start
from model_worker.engine.parallel.group import OneRank
from model_worker.engine.sampling_params import SamplingParams
from tests.fakes.byte_tokenizer import ByteTokenizer
from tests.fakes.divided_models import divided_runner
from tests.fakes.fake_accelerator import FakeAccelerator, compute_as_on_a_gpu
from tests.fakes.rank_launcher import fork_rank
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan


def _config(size: int, *, enforce_eager: bool = False) -> EngineConfig:
    return EngineConfig(
        CacheConfig(block_size=4, num_blocks=24),  # so few that sequences are preempted
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=16),
        speculation=SpeculationConfig(speculation="off"),
        model_impl="native",
        tensor_parallel_size=size,
        enforce_eager=enforce_eager,
    )


def _rank_as_on_a_gpu(steps: Connection, variants: Connection) -> None:
    with pytest.MonkeyPatch.context() as patch:
        compute_as_on_a_gpu(patch)
        patch.setattr(rank_process, "ModelRunner", partial(ModelRunner, accelerator=FakeAccelerator()))
        rank_process.main(steps, variants)


def _answers(runner: ModelRunner) -> dict[str, list[int]]:
    engine = LLMEngine(_config(1), runner, ByteTokenizer(), stop_token_ids=(), max_model_len=64)
    for number in range(9):
        sampling = SamplingParams(
            temperature=0.0 if number % 2 else 1.0,
            n=1 + number % 3 // 2,
            seed=number,
            max_tokens=4 + 3 * number,
            repetition_penalty=1.2 if number == 7 else 1.0,
            prompt_logprobs=1 if number == 3 else None,
        )
        engine.add_request(str(number), [(number * 7 + i) % 50 for i in range(1 + 2 * number)], sampling)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            assert output.error is None, output.error
            for delta in output.deltas:
                tokens.setdefault(f"{output.request_id}.{delta.index}", []).extend(delta.token_ids)
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_two_ranks_run_ahead_with_the_tokens_of_one(
    enforce_eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    build_tiny_model("llama").save_pretrained(tmp_path)
    plan = make_tiny_plan(tmp_path)
    expected = _answers(ModelRunner(plan, _config(1), group=OneRank()))
    compute_as_on_a_gpu(monkeypatch)
    accelerator = FakeAccelerator()
    monkeypatch.setattr(start, "ModelRunner", partial(ModelRunner, accelerator=accelerator))
    config = _config(2, enforce_eager=enforce_eager)
    with divided_runner(plan, config, launch=partial(fork_rank, _rank_as_on_a_gpu)) as runner:
        assert runner.runs_ahead
        assert _answers(runner) == expected
    assert (accelerator.num_replays > 10) == (not enforce_eager)
