from __future__ import annotations

import pytest
import torch

from delta import greedy_answers as module
from delta.greedy_answers import greedy_answers
from tests.fakes.tiny_models import TINY_MODELS, build_tiny_model

QUESTIONS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19]]


@pytest.mark.parametrize("architecture", TINY_MODELS)
def test_questions_together_are_answered_as_each_alone(architecture: str) -> None:
    model = build_tiny_model(architecture)
    together = greedy_answers(model, QUESTIONS)
    alone = [greedy_answers(model, [question])[0] for question in sorted(QUESTIONS, key=len)]
    for answer, other in zip(together, alone, strict=True):
        assert answer.num_tokens == len(answer.decided) <= 32
        assert answer.agreement(model).all()
        if architecture != "llama4-temperature":  # transformers takes its temperatures from padded positions
            assert answer.whole == other.whole
            assert torch.equal(answer.decided, other.decided)


def test_an_answer_ends_with_the_token_that_ends_it() -> None:
    model = build_tiny_model("llama")
    long = greedy_answers(model, QUESTIONS)
    assert any(answer.decided.any() for answer in long)
    end = long[0].whole[3]
    model.generation_config.eos_token_id = [end]
    for answer, longer in zip(greedy_answers(model, QUESTIONS), long, strict=True):
        said, more = answer.whole[-answer.num_tokens :], longer.whole[-longer.num_tokens :]
        assert said == more[: more.index(end) + 1 if end in more else 32]


def test_as_many_questions_at_a_time_as_fit() -> None:
    batches = [[len(question) for question in batch] for batch in module._batches(QUESTIONS, 8)]
    assert batches == [[1, 3], [4], [7]]
    assert [len(batch) for batch in module._batches(QUESTIONS, 0)] == [1, 1, 1, 1]
    assert list(module._batches([], 8)) == []
