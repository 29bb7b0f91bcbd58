"""What is launched on a device is what the host would have sampled; here on CPU tensors, by the same operations."""

from __future__ import annotations

import pytest
import torch

from model_worker.engine.device_sampler import launch_on_device
from model_worker.engine.outputs import SampledToken
from model_worker.engine.sampler import Sampler
from model_worker.engine.sequence import Sequence
from registry.errors import InternalError
from tests.model_worker.engine.test_sampler import make_sequence, mixed_batch

torch.set_num_threads(1)


def _check(logits: torch.Tensor, sequences: list[Sequence], eos: tuple[int, ...] = ()) -> None:
    expected = Sampler(logits.shape[1], eos).sample(logits.clone(), sequences)
    pending = launch_on_device(logits.clone(), sequences, eos)
    found = pending.finish()
    for row, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if isinstance(theirs, SampledToken):
            assert isinstance(mine, SampledToken)
            assert mine.token_id == theirs.token_id == pending.tokens[row].item()
            assert mine.logprobs == theirs.logprobs
        else:
            assert type(mine) is type(theirs)
            assert 0 <= pending.tokens[row].item() < logits.shape[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_that_differ_in_everything(dtype: torch.dtype) -> None:
    vocab_size = 20_000
    sequences = mixed_batch(vocab_size)
    logits = torch.randn(len(sequences), vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    _check(logits.to(dtype), sequences, (2,))


@pytest.mark.parametrize("logprobs", [None, 0, 4])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"repetition_penalty": 1.3}, {"top_k": 3000}], ids=str)
def test_batches_of_one_kind(sampling: dict[str, float], logprobs: int | None) -> None:
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(1)).bfloat16()
    _check(logits, [make_sequence(seed=seed, logprobs=logprobs, **sampling) for seed in range(5)])


def test_logits_are_not_changed_where_nothing_is_processed() -> None:
    logits = torch.randn(2, 50)
    before = logits.clone()
    launch_on_device(logits, [make_sequence(logprobs=1), make_sequence()], ()).finish()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("neighbour", [{"temperature": 0.0}, {"min_tokens": 2}, {"top_p": 0.5}], ids=str)
def test_rows_that_are_not_finite(broken: float, neighbour: dict[str, float]) -> None:
    logits = torch.zeros(4, 300)
    logits[:, 8] = 40.0
    logits[1] = broken
    logits[2, ... if broken < 0 else 5] = broken
    sequences = [make_sequence(**neighbour, logprobs=1) for _ in range(3)] + [make_sequence(temperature=0.0)]
    _check(logits, sequences, (0,))
    found = launch_on_device(logits.clone(), sequences, (0,)).finish()
    assert [isinstance(sample, InternalError) for sample in found] == [False, True, True, False]


def test_rows_in_which_the_request_forbids_everything() -> None:
    sequences = [make_sequence(min_tokens=1, stop_token_ids=(0, 1)), make_sequence(min_tokens=1, temperature=0.0)]
    _check(torch.zeros(2, 3), sequences, (2,))
    _check(torch.tensor([[0.0, 0.0, float("nan")], [0.0, 1.0, 2.0]]), sequences, (2,))
