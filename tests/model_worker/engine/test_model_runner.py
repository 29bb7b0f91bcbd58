"""The model runner by itself: what the scheduler may ask of it beyond plain greedy decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.outputs import SampledToken
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from registry.errors import InternalError
from tests.fakes.tiny_models import VOCAB_SIZE, build_tiny_model, make_tiny_plan

BLOCK_SIZE = 8
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build_tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def runner(checkpoint: Path) -> ModelRunner:
    torch.set_num_threads(1)
    config = EngineConfig(
        CacheConfig(block_size=BLOCK_SIZE, num_blocks=32), SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=40)
    )
    return ModelRunner(make_tiny_plan(checkpoint), config)


def _sequence(seq_id: int, num_tokens: int, blocks: list[int], sampling: SamplingParams = GREEDY) -> Sequence:
    generator = torch.Generator().manual_seed(num_tokens)
    prompt = torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
    sequence = Sequence(seq_id, 0, prompt, sampling, seed=seq_id)
    sequence.block_table = blocks
    return sequence


def _token(sample: object) -> int:
    assert isinstance(sample, SampledToken), sample
    return sample.token_id


def test_says_what_the_engine_needs(runner: ModelRunner) -> None:
    assert (runner.num_blocks, runner.block_size, runner.vocab_size) == (32, BLOCK_SIZE, VOCAB_SIZE)


def test_several_sequences_sample_from_one_row(runner: ModelRunner) -> None:
    parent = _sequence(0, 11, [4, 2])
    sibling = _sequence(1, 11, [4, 2], SamplingParams(temperature=0.0, logprobs=0))
    other = _sequence(2, 5, [7])
    result = runner.execute(
        SchedulerOutput((ScheduledSequence(other, 0, 5, (other,)), ScheduledSequence(parent, 0, 11, (parent, sibling))))
    )
    assert len(result.samples) == 3
    assert _token(result.samples[1]) == _token(result.samples[2])
    alone = runner.execute(SchedulerOutput((ScheduledSequence(other, 0, 5, (other,)),)))
    assert alone.samples == result.samples[:1]


def test_nothing_is_sampled_while_a_prompt_is_not_complete(runner: ModelRunner) -> None:
    sequence = _sequence(0, 20, [1, 2, 3])
    assert runner.execute(SchedulerOutput((ScheduledSequence(sequence, 0, 12),))).samples == ()
    in_chunks = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 12, 8, (sequence,)),)))
    sequence.block_table = [9, 8, 7]
    at_once = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 0, 20, (sequence,)),)))
    assert in_chunks.samples == at_once.samples


def test_prompt_logprobs_come_chunk_by_chunk(runner: ModelRunner) -> None:
    sequence = _sequence(0, 20, [1, 2, 3], SamplingParams(temperature=0.0, prompt_logprobs=2))
    at_once = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 0, 20, (sequence,)),))).prompt_logprobs[0]
    assert [entry.token_id for entry in at_once] == sequence.token_ids[1:]
    assert all(len(entry.top) == 2 for entry in at_once)
    in_chunks = []
    for start, num in ((0, 7), (7, 1), (8, 12)):
        sampled = (sequence,) if start + num == 20 else ()
        result = runner.execute(SchedulerOutput((ScheduledSequence(sequence, start, num, sampled),)))
        in_chunks += result.prompt_logprobs[0]
    assert [entry.token_id for entry in in_chunks] == [entry.token_id for entry in at_once]
    torch.testing.assert_close(
        torch.tensor([entry.logprob for entry in in_chunks]),
        torch.tensor([entry.logprob for entry in at_once]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_prompt_logprobs_end_with_the_prompt(runner: ModelRunner) -> None:
    sequence = _sequence(0, 4, [1], SamplingParams(temperature=0.0, prompt_logprobs=0))
    sequence.append(5)
    result = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 0, 5, (sequence,)),)))
    assert len(result.prompt_logprobs[0]) == 3
    result = runner.execute(SchedulerOutput((ScheduledSequence(sequence, 4, 1, (sequence,)),)))
    assert result.prompt_logprobs[0] == []


def test_blocks_are_copied_before_they_are_written(runner: ModelRunner) -> None:
    first = _sequence(0, 12, [1, 2])
    runner.execute(SchedulerOutput((ScheduledSequence(first, 0, 12, (first,)),)))
    fork = _sequence(1, 12, [1, 5])
    for sequence, token_id in ((first, 3), (fork, 99)):
        sequence.append(token_id)
    together = runner.execute(
        SchedulerOutput(
            (ScheduledSequence(first, 12, 1, (first,)), ScheduledSequence(fork, 12, 1, (fork,))),
            block_copies=((2, 5),),
        )
    )
    fresh = [_sequence(2, 12, [10, 11]), _sequence(3, 12, [12, 13])]
    for sequence, token_id in zip(fresh, (3, 99), strict=True):
        sequence.append(token_id)
    expected = runner.execute(SchedulerOutput(tuple(ScheduledSequence(s, 0, 13, (s,)) for s in fresh)))
    assert together.samples == expected.samples


def test_a_broken_sequence_spoils_no_other(runner: ModelRunner) -> None:
    """NaN in a prompt: its request fails, nobody else does, nor does the next owner of its blocks."""
    bad, good = _sequence(0, 11, [1, 2]), _sequence(1, 9, [3, 4])
    expected = runner.execute(SchedulerOutput((ScheduledSequence(good, 0, 9, (good,)),))).samples
    embedding = runner.model.causal_lm.get_input_embeddings().weight
    poison = next(token_id for token_id in bad.token_ids if token_id not in good.token_ids)
    with torch.inference_mode():
        kept = embedding[poison].clone()
        embedding[poison] = float("nan")
        both = runner.execute(
            SchedulerOutput((ScheduledSequence(bad, 0, 11, (bad,)), ScheduledSequence(good, 0, 9, (good,))))
        )
        embedding[poison] = kept
    assert isinstance(both.samples[0], InternalError)
    assert both.samples[1:] == expected
    good.block_table = [2, 1]
    assert runner.execute(SchedulerOutput((ScheduledSequence(good, 0, 9, (good,)),))).samples == expected


def test_two_models_in_one_process_do_not_meet(checkpoint: Path, runner: ModelRunner) -> None:
    config = EngineConfig(
        CacheConfig(block_size=4, num_blocks=16), SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16)
    )
    second = ModelRunner(make_tiny_plan(checkpoint), config)
    a, b = _sequence(0, 11, [1, 2]), _sequence(0, 11, [3, 5, 7])
    first_tokens, second_tokens = [], []
    for _ in range(4):
        for executor, sequence, tokens in ((runner, a, first_tokens), (second, b, second_tokens)):
            start = 0 if not tokens else sequence.num_tokens - 1
            item = ScheduledSequence(sequence, start, sequence.num_tokens - start, (sequence,))
            tokens.append(_token(executor.execute(SchedulerOutput((item,))).samples[0]))
            sequence.append(tokens[-1])
            if sequence.num_tokens > len(sequence.block_table) * executor.block_size:
                sequence.block_table.append(9)
    assert first_tokens == second_tokens
