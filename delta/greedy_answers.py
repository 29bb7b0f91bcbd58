"""What a model says to a question, the most likely token each time, and whether another one would say it as well."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from delta.next_logprobs import next_logprobs

_MAX_ANSWER_TOKENS = 32
_MAX_BATCH_TOKENS = 1024
"""Of the questions that are answered at the same time, with padding."""
_UNDECIDED = 1.5
"""A token is undecided if the most likely one is less than so many times as likely as the next."""


@dataclass(frozen=True, slots=True, eq=False)
class GreedyAnswer:
    """Attributes:
    whole: the question's tokens and those of the answer.
    num_tokens: of the answer, with the one that ends it.
    decided: [num_tokens]; where the next likely token is far behind, when the answer is read as a whole.
    """

    whole: tuple[int, ...]
    num_tokens: int
    decided: Tensor

    @classmethod
    def of(cls, model: nn.Module, question: Sequence[int], answer: Sequence[int]) -> GreedyAnswer:
        whole = (*question, *answer)
        logprobs, token_ids = next_logprobs(model, whole[:-1])[-len(answer) :].topk(2)
        decided = logprobs[:, 0] - logprobs[:, 1] >= math.log(_UNDECIDED)
        return cls(whole, len(answer), decided & (token_ids[:, 0] == torch.tensor(answer)))

    def agreement(self, model: nn.Module) -> Tensor:
        """Whether the model's most likely token is the same, at each that was decided; all are, of the same model."""
        found = next_logprobs(model, self.whole[:-1])[-self.num_tokens :].argmax(-1)
        return (found == torch.tensor(self.whole[-self.num_tokens :]))[self.decided]


def greedy_answers(model: Any, questions: Sequence[Sequence[int]]) -> list[GreedyAnswer]:
    """A model's answers of at most 32 tokens, the shortest questions first.

    Several questions at a time, since each step reads all weights; one by one where the model of transformers cannot be
    told at which positions a padded question begins.
    """
    max_tokens = _MAX_BATCH_TOKENS if "position_ids" in inspect.signature(model.forward).parameters else 0
    return [
        GreedyAnswer.of(model, question, answer)
        for batch in _batches(questions, max_tokens)
        for question, answer in zip(batch, _answers(model, batch), strict=True)
    ]


def _batches(questions: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Questions of similar lengths, at least one, that have at most so many tokens when they are padded."""
    batch: list[Sequence[int]] = []
    for question in sorted(questions, key=len):
        if batch and (len(batch) + 1) * len(question) > max_tokens:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


@torch.inference_mode()
def _answers(model: Any, questions: Sequence[Sequence[int]]) -> list[list[int]]:
    ends = _end_token_ids(model)
    width = max(map(len, questions))
    read = torch.tensor([[0] * (width - len(question)) + list(question) for question in questions])
    is_token = torch.tensor([[0] * (width - len(question)) + [1] * len(question) for question in questions])
    seen = DynamicCache()
    answers: list[list[int]] = [[] for _ in questions]
    unfinished = set(range(len(questions)))
    while unfinished:
        padding = {}
        if len(questions) > 1:
            positions = (is_token.cumsum(1) - 1).clamp_min(0)[:, -read.shape[1] :]
            padding = {"attention_mask": is_token, "position_ids": positions}
        logits = model(read, past_key_values=seen, use_cache=True, **padding).logits[:, -1]
        read = logits.argmax(-1, keepdim=True)
        is_token = torch.cat([is_token, is_token.new_ones(len(questions), 1)], dim=1)
        for index in sorted(unfinished):
            answers[index].append(int(read[index]))
            if answers[index][-1] in ends or len(answers[index]) == _MAX_ANSWER_TOKENS:
                unfinished.remove(index)
    return answers


def _end_token_ids(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)
