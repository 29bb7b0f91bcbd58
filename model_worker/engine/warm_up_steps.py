"""Steps of nobody, computed before the first request: to have all ready, and to see what the largest one takes."""

from __future__ import annotations

from collections.abc import Iterator

from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput

_SHORT_CHUNK = 2
_MIDDLE_CHUNK = 40  # products with quantized weights, the head too, have a kernel of their own for 17 to 64 rows
# Logits of every row are kept, changed and put in order.
_EVERYTHING = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1, logprobs=1, max_tokens=1)


def every_kind_of_step(num_tokens: int, *, block_size: int, num_groups: int) -> Iterator[SchedulerOutput]:
    """A prompt chunk of so many tokens, some drafts, one token after the prompt, and such a token beside a short chunk.

    GPUs have other kernels for each, or other forms of them. The blocks that they write are the first ones.
    """
    sequence, other = (Sequence(n, 0, [0] * num_tokens, SamplingParams(temperature=0.0), seed=0) for n in range(2))
    num_blocks = -(-num_tokens // block_size)
    for each in (sequence, other):
        each.block_tables = [list(range(g * num_blocks, (g + 1) * num_blocks)) for g in range(num_groups)]
    token = ScheduledSequence(sequence, num_tokens - 1, 1, (sequence,))
    yield SchedulerOutput((ScheduledSequence(sequence, 0, num_tokens, (sequence,)),))
    if num_tokens > _MIDDLE_CHUNK:
        drafted = Sequence(2, 0, [0], SamplingParams(temperature=0.0), seed=0)
        drafted.block_tables = sequence.block_tables
        yield SchedulerOutput((ScheduledSequence(drafted, 0, _MIDDLE_CHUNK, (drafted,), (0,) * (_MIDDLE_CHUNK - 1)),))
    if num_tokens > 1:
        yield SchedulerOutput((token,))
    if num_tokens > _SHORT_CHUNK:
        yield SchedulerOutput((token, ScheduledSequence(other, 0, _SHORT_CHUNK, (other,))))


def largest_step(
    *, num_tokens: int, num_sequences: int, max_model_len: int, block_size: int, num_groups: int
) -> tuple[SchedulerOutput, int]:
    """As many tokens and sampled rows as a step can have. -> it, and how many blocks it takes

    Every sequence has a draft, where there are tokens enough, and so two rows with logits.
    """
    num_each = min(max_model_len, max(1, num_tokens // num_sequences))
    lengths = [num_each] * num_sequences
    lengths[0] = min(max_model_len, num_tokens - num_each * (num_sequences - 1))
    items = []
    num_blocks = 0
    for number, length in enumerate(lengths):
        drafts = (0,) if length > 1 else ()
        sequence = Sequence(number, 0, [0] * (length - len(drafts)), _EVERYTHING, seed=number)
        of_each = -(-length // block_size)
        sequence.block_tables = [
            list(range(num_blocks + g * of_each, num_blocks + (g + 1) * of_each)) for g in range(num_groups)
        ]
        num_blocks += num_groups * of_each
        items.append(ScheduledSequence(sequence, 0, length, (sequence,), drafts))
    return SchedulerOutput(tuple(items)), num_blocks
