"""Ranks as they are on GPUs, with CPU tensors: each replays its graphs, and steps run ahead of the tokens that rank 0
draws.
"""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.parallel import rank_process, start
from model_worker.engine.parallel.group import OneRank
from tests.fakes.divided_models import divided_runner
from tests.fakes.fake_accelerator import FakeAccelerator, compute_as_on_a_gpu
from tests.fakes.mixed_requests import mixed_answers, mixed_config
from tests.fakes.rank_launcher import fork_rank
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan


def _rank_as_on_a_gpu(steps: Connection, variants: Connection) -> None:
    with pytest.MonkeyPatch.context() as patch:
        compute_as_on_a_gpu(patch)
        patch.setattr(rank_process, "ModelRunner", partial(ModelRunner, accelerator=FakeAccelerator()))
        rank_process.main(steps, variants)


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_two_ranks_run_ahead_with_the_tokens_of_one(
    enforce_eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    build_tiny_model("llama").save_pretrained(tmp_path)
    plan = make_tiny_plan(tmp_path)
    expected = mixed_answers(ModelRunner(plan, mixed_config(model_impl="native"), group=OneRank()))
    compute_as_on_a_gpu(monkeypatch)
    accelerator = FakeAccelerator()
    monkeypatch.setattr(start, "ModelRunner", partial(ModelRunner, accelerator=accelerator))
    config = mixed_config(model_impl="native", tensor_parallel_size=2, enforce_eager=enforce_eager)
    with divided_runner(plan, config, launch=partial(fork_rank, _rank_as_on_a_gpu)) as runner:
        assert runner.runs_ahead
        assert mixed_answers(runner) == expected
    assert (accelerator.num_replays > 10) == (not enforce_eager)
