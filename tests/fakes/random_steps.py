"""Steps of every kind, as a scheduler could ask for them: prompts and pieces of them, single tokens, drafts, mixes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence as SequenceOf

from model_worker.engine.lora.variant import Variant
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput


class RandomSteps:
    """Steps that have nothing to do with each other.

    Args:
        max_num_seqs, max_num_batched_tokens, max_model_len: bounds of all steps.
        block_size, num_groups: of the KV cache, whose first blocks are used by all sequences.
        vocab_size: of the model.
    """

    def __init__(
        self,
        seed: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        num_groups: int,
        vocab_size: int,
    ) -> None:
        self._random = random.Random(seed)
        self._max_num_seqs = max_num_seqs
        self._max_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        num_blocks = -(-max_model_len // block_size)
        self._block_tables = [list(range(group * num_blocks, (group + 1) * num_blocks)) for group in range(num_groups)]
        self._vocab_size = vocab_size
        self._num_sequences = 0

    def decoding(self, num_sequences: int, variants: SequenceOf[Variant | None]) -> SchedulerOutput:
        """One token of each of so many sequences."""
        return SchedulerOutput(tuple(self._token(variant) for variant in self._chosen(variants, num_sequences)))

    def mixed(self, variants: SequenceOf[Variant | None]) -> SchedulerOutput:
        """Tokens, drafts and pieces of prompts."""
        items: list[ScheduledSequence] = []
        left = self._max_tokens
        count = self._random.choice((1, 1, 2, 3, self._random.randint(1, self._max_num_seqs)))
        for place, variant in enumerate(self._chosen(variants, count)):
            most = min(left - (count - place - 1), self._max_model_len)
            kind = self._random.choice(("token", "drafts", "piece", "piece"))
            if kind == "token" or most < 4:
                items.append(self._token(variant))
            elif kind == "drafts":
                items.append(self._token(variant, num_drafts=self._random.randint(1, 3)))
            else:
                num_tokens = self._random.choice((1, 2, 3, 17, 33, self._random.randint(1, most)))
                items.append(self._piece(variant, min(num_tokens, most)))
            left -= items[-1].num_tokens
        return SchedulerOutput(tuple(items))

    def _chosen(self, variants: SequenceOf[Variant | None], count: int) -> list[Variant | None]:
        """In the order in which a scheduler puts them: those of one variant side by side."""
        chosen = [self._random.choice(variants) for _ in range(count)]
        return sorted(chosen, key=lambda variant: -1 if variant is None else variant.number)

    def _token(self, variant: Variant | None, *, num_drafts: int = 0) -> ScheduledSequence:
        start = self._random.randrange(self._max_model_len - num_drafts)
        sequence = self._sequence(start + 1, variant)
        drafts = (0,) * num_drafts
        return ScheduledSequence(sequence, start, 1 + num_drafts, (sequence,), drafts)

    def _piece(self, variant: Variant | None, num_tokens: int) -> ScheduledSequence:
        start = self._random.choice((0, self._random.randint(0, self._max_model_len - num_tokens)))
        is_last = self._random.random() < 0.7
        end = start + num_tokens
        sequence = self._sequence(end if is_last else min(end + 9, self._max_model_len), variant)
        sampled = (sequence,) * self._random.choice((1, 1, 2)) if is_last else ()
        return ScheduledSequence(sequence, start, num_tokens, sampled)

    def _sequence(self, num_tokens: int, variant: Variant | None) -> Sequence:
        self._num_sequences += 1
        sequence = Sequence(
            self._num_sequences, 0, [0] * num_tokens, self._sampling(), seed=self._num_sequences, variant=variant
        )
        sequence.block_tables = list(self._block_tables)
        return sequence

    def _sampling(self) -> SamplingParams:
        choose = self._random.choice
        return SamplingParams(
            temperature=choose((0.0, 0.0, 1.0, 0.3)),
            top_p=choose((1.0, 0.9)),
            top_k=choose((0, 1, 40, self._vocab_size - 1)),
            min_p=choose((0.0, 0.0, 0.1)),
            repetition_penalty=choose((1.0, 1.0, 1.0, 1.2)),
            presence_penalty=choose((0.0, 0.0, 0.0, 0.5)),
            frequency_penalty=choose((0.0, 0.0, 0.0, -0.5)),
            logit_bias=choose(({}, {}, {3: 1.0})),
            min_tokens=choose((0, 0, 2)),
            logprobs=choose((None, None, 0, 5)),
            prompt_logprobs=choose((None, None, None, None, 1)),
        )


def every_step(
    steps: RandomSteps, decoded: SequenceOf[int], variants: SequenceOf[Variant | None], num_mixed: int
) -> Iterator[SchedulerOutput]:
    """Decode steps of so many sequences each, of the base alone and of all, and some others."""
    for num_sequences in decoded:
        yield steps.decoding(num_sequences, (None,))
        yield steps.decoding(num_sequences, variants)
    for _ in range(num_mixed):
        yield steps.mixed(variants)
