"""What rank 0 tells another rank, here a thread that writes it down."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from delta.variant_terms import LinearTerms, VariantTerms
from model_worker.engine.batch_builder import BatchBuilder
from model_worker.engine.config import EngineConfig
from model_worker.engine.executor import ExecutorLostError
from model_worker.engine.parallel import ranks as ranks_module
from model_worker.engine.parallel.leading_steps import LeadingSteps
from model_worker.engine.parallel.messages import Assignment, Bind, Ready, Step, Weight, send
from model_worker.engine.parallel.process_group import ProcessGroup, join_store
from model_worker.engine.parallel.rank_process import BoundShare, carry_out
from model_worker.engine.parallel.ranks import Ranks, RunningRank
from model_worker.engine.parallel.sharding import Part, inputs, outputs
from model_worker.engine.parallel.shared_variants import SharedVariants
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_batch import StepBatch
from registry.errors import InternalError, UnsupportedModelError
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan

WEIGHT = torch.arange(24.0).view(4, 6)
BIAS = torch.arange(4.0)


class FakeRank:
    """Rank 1 of 2. Also a `RankProcess`.

    Attributes:
        steps, requests: that it was sent.
        refusal: answer to a variant, and to who asks for a weight.
        reads_steps: set; else it is stuck.
    """

    def __init__(self) -> None:
        self.assignment: Assignment | None = None
        self.steps: list[Step] = []
        self.requests: list[Bind | Weight] = []
        self.refusal: UnsupportedModelError | None = None
        self.reads_steps = threading.Event()
        self.reads_steps.set()
        self._ended = threading.Event()

    def launch(self) -> RunningRank:
        steps, their_steps = Pipe()
        variants, their_variants = Pipe()
        threading.Thread(target=self._compute, args=(their_steps,), daemon=True).start()
        threading.Thread(target=self._answer, args=(their_variants,), daemon=True).start()
        return RunningRank(self, steps, variants)

    def wait(self, timeout: float | None = None) -> int | None:
        self._ended.wait(timeout)
        return 0

    def kill(self) -> None:
        raise AssertionError("it ends by itself")

    def _compute(self, steps: Connection) -> None:
        with steps:
            self.assignment = steps.recv()
            assert self.assignment is not None
            join = partial(join_store, self.assignment.port, 2)
            group = ProcessGroup(join, rank=1, size=2, device=torch.device("cpu"))
            send([steps], Ready())
            try:
                while self.reads_steps.wait():
                    self.steps.append(steps.recv())
            except EOFError:
                group.abort()
                self._ended.set()

    def _answer(self, variants: Connection) -> None:
        with variants:
            while True:
                try:
                    self.requests.append(variants.recv())
                except EOFError:
                    return
                request = self.requests[-1]
                if self.refusal is not None:
                    send([variants], self.refusal)
                elif isinstance(request, Bind):
                    send([variants], 100)
                elif request.kind == "bias":
                    send([variants], BIAS[2:])
                else:
                    send([variants], WEIGHT[2:] if request.module == "up" else WEIGHT[:, 3:])


class FakeModel:
    """Rank 0's share of two modules."""

    divisions = {"up": outputs(Part(4, 4, "neurons")), "down": inputs(Part(6, 6, "neurons"))}  # noqa: RUF012
    binds_in_host_memory = True

    def base_weight(self, module: str) -> torch.Tensor:
        return WEIGHT[:2] if module == "up" else WEIGHT[:, :3]

    def base_bias(self, module: str) -> torch.Tensor:
        return BIAS[:2] if module == "up" else BIAS

    def bind(self, terms: VariantTerms) -> Any:
        return replace(terms, digest="own")


@pytest.fixture
def rank() -> FakeRank:
    return FakeRank()


@contextmanager
def _ranks(rank: FakeRank, path: Path) -> Iterator[Ranks]:
    build_tiny_model("llama").save_pretrained(path)
    plan = replace(make_tiny_plan(path), config=MappingProxyType(dict(make_tiny_plan(path).config)))
    ranks = Ranks(plan, EngineConfig(), ["cpu", "cpu"], rank.launch)
    try:
        ranks.wait_until_ready()
        yield ranks
    finally:
        ranks.close()


def _batch() -> StepBatch:
    sequence = Sequence(0, 0, [5, 6, 7], SamplingParams(), seed=0)
    sequence.block_tables = [[3]]
    return BatchBuilder(16, 1).build(SchedulerOutput((ScheduledSequence(sequence, 0, 3, (sequence,)),)))


def test_a_rank_is_told_what_it_is_and_gets_batches(rank: FakeRank, tmp_path: Path) -> None:
    with _ranks(rank, tmp_path) as ranks:
        ranks.send_step(_batch(), {7: 1})
    rank.wait()
    assert rank.assignment is not None
    assert (rank.assignment.rank, rank.assignment.num_ranks) == (1, 2)
    assert rank.assignment.plan.config["model_type"] == "llama"
    (step,) = rank.steps
    assert step.batch.input_ids.tolist() == [5, 6, 7]
    assert step.batch.slot_mapping.tolist() == [[48, 49, 50]]
    assert step.variants == {7: 1}


def test_a_rank_gets_its_terms_and_hears_when_a_variant_is_gone(rank: FakeRank, tmp_path: Path) -> None:
    with _ranks(rank, tmp_path) as ranks:
        variants = SharedVariants(FakeModel(), ranks)
        terms = VariantTerms("", {"up": LinearTerms(bias=torch.arange(4.0))})
        model_bytes = terms.num_bytes // 2
        first = variants.bind(terms)
        assert first.num_bytes == 100 + model_bytes
        number = first.number
        del first
        gc.collect()
        second = variants.bind(terms)
        ranks.send_step(_batch(), {})
        assert second.number != number
        bound = [request for request in rank.requests if isinstance(request, Bind)]
        assert [request.dropped for request in bound] == [(), (number,)]
        bias = bound[0].terms.linears["up"].bias
        assert bias is not None
        assert bias.tolist() == [2.0, 3.0]


def test_a_variant_that_one_rank_refuses_is_refused(rank: FakeRank, tmp_path: Path) -> None:
    rank.refusal = UnsupportedModelError("no place for it")
    with _ranks(rank, tmp_path) as ranks:
        variants = SharedVariants(FakeModel(), ranks)
        with pytest.raises(UnsupportedModelError, match="no place for it"):
            variants.bind(VariantTerms(""))
        ranks.send_step(_batch(), {})
    rank.wait()
    assert rank.steps[0].dropped == (1,)


def test_what_keeps_a_rank_from_giving_a_weight_is_said(rank: FakeRank, tmp_path: Path) -> None:
    rank.refusal = UnsupportedModelError("no copy of it")
    with _ranks(rank, tmp_path) as ranks, pytest.raises(UnsupportedModelError, match="no copy of it"):
        SharedVariants(FakeModel(), ranks).base_weight("up")


@pytest.mark.parametrize("request_", [Weight("up", "weight"), Bind(1, VariantTerms(""), ())])
def test_a_rank_answers_whatever_goes_wrong(request_: Bind | Weight) -> None:
    answer = carry_out(request_, BoundShare(), torch.device("cpu"))  # which has no model
    assert isinstance(answer, InternalError)
    assert "AssertionError" in answer.message


def test_rank_0_does_not_wait_for_ever_until_a_step_is_taken(
    rank: FakeRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _ranks(rank, tmp_path) as ranks:
        rank.reads_steps.clear()
        monkeypatch.setattr(ranks_module, "STEP_TIMEOUT_S", 0.5)
        ranks.on_lost = rank.reads_steps.set  # in a worker this process ends
        with pytest.raises(ExecutorLostError, match="is stuck"):
            _send_steps(ranks, 10_000)


def _send_steps(ranks: Ranks, number: int) -> None:
    for _ in range(number):
        ranks.send_step(_batch(), {})


def test_rank_0_does_not_wait_for_ever_until_blocks_are_swapped(rank: FakeRank, tmp_path: Path) -> None:
    deadlines: list[float | None] = []
    with _ranks(rank, tmp_path) as ranks:
        own: Any = SimpleNamespace(move_blocks=lambda moves: deadlines.append(ranks._fate.deadline_s))
        LeadingSteps(own, ranks).move_blocks(_batch().blocks)
        assert deadlines[0] is not None
        assert ranks._fate.deadline_s is None


def test_a_step_without_memory_names_settings_that_help(
    rank: FakeRank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "_REASON_S", 0.0)
    with _ranks(rank, tmp_path) as ranks:

        def fail(moves: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nA trace.")

        own: Any = SimpleNamespace(move_blocks=fail)
        expected = (
            r"rank 0 \(OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.\), and the others wait for it. "
            r"Start the worker again with --gpu-memory-utilization 0.85, --max-num-batched-tokens \d+ or --max-num-seqs"
        )
        with pytest.raises(ExecutorLostError, match=expected):
            LeadingSteps(own, ranks).move_blocks(_batch().blocks)
        assert ranks.lost(ValueError("no place")).message == (
            "A step failed on rank 0 (ValueError: no place), and the others wait for it. Start the worker again."
        )


def test_weights_of_the_base_are_put_together(rank: FakeRank, tmp_path: Path) -> None:
    with _ranks(rank, tmp_path) as ranks:
        variants = SharedVariants(FakeModel(), ranks)
        assert torch.equal(variants.base_weight("up"), WEIGHT)
        assert torch.equal(variants.base_weight("down"), WEIGHT)
        assert torch.equal(variants.base_bias("up"), BIAS)
        assert torch.equal(variants.base_bias("down"), BIAS)  # only rank 0's counts, which is whole
