from __future__ import annotations

import pickle

import numpy as np
import pytest

from model_worker.engine.batch_builder import BatchBuilder, prompt_targets
from model_worker.engine.lora.variant import Variant
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_batch import PendingToken, PromptRows, RowSegment, StepBatch


def make_sequence(
    seq_id: int, num_tokens: int, *tables: list[int], variant: Variant | None = None, prompt_logprobs: int | None = None
) -> Sequence:
    """Token ids are 100 * seq_id + position."""
    token_ids = [100 * seq_id + position for position in range(num_tokens)]
    sequence = Sequence(seq_id, 0, token_ids, SamplingParams(prompt_logprobs=prompt_logprobs), seed=0, variant=variant)
    sequence.block_tables = list(tables)
    return sequence


def build(*items: ScheduledSequence, num_groups: int = 1, builder: BatchBuilder | None = None) -> StepBatch:
    return (builder or BatchBuilder(4, num_groups)).build(SchedulerOutput(items))


def test_a_prompt_and_a_decoding_sequence() -> None:
    prompt, decoding = make_sequence(1, 9, [5, 2, 7]), make_sequence(2, 6, [3, 8])
    batch = build(ScheduledSequence(prompt, 2, 4), ScheduledSequence(decoding, 5, 1, (decoding,)))
    assert batch.input_ids.tolist() == [102, 103, 104, 105, 205]
    assert batch.positions.tolist() == [2, 3, 4, 5, 5]
    assert batch.slot_mapping.tolist() == [[5 * 4 + 2, 5 * 4 + 3, 2 * 4, 2 * 4 + 1, 8 * 4 + 1]]
    assert batch.block_tables.tolist() == [[[5, 2], [3, 8]]]
    assert (batch.query_start, batch.seq_lens) == ((0, 4, 5), (6, 6))
    assert (batch.logit_rows.tolist(), batch.repeats) == ([4], None)
    assert batch.blocks.cleared == (2,)  # of the other's last block the first slot was written before
    assert [a.dtype for a in (batch.input_ids, batch.positions, batch.slot_mapping)] == [np.int64] * 3
    assert batch.block_tables.dtype == np.int32


def test_every_layer_group_has_its_own_tables_and_slots() -> None:
    a, b = make_sequence(1, 6, [5, 2], [0, 9]), make_sequence(2, 3, [3], [8])
    batch = build(ScheduledSequence(a, 5, 1, (a,)), ScheduledSequence(b, 2, 1, (b,)), num_groups=2)
    assert batch.block_tables.tolist() == [[[5, 2], [3, 0]], [[0, 9], [8, 0]]]
    assert batch.slot_mapping.tolist() == [[2 * 4 + 1, 3 * 4 + 2], [9 * 4 + 1, 8 * 4 + 2]]


@pytest.mark.parametrize(
    ("start", "num_tokens", "cleared"),
    [(0, 3, (6,)), (0, 4, ()), (0, 5, (7,)), (4, 1, (7,)), (5, 1, ()), (3, 2, (7,)), (3, 1, ())],
)
def test_a_block_is_cleared_when_it_is_begun_and_not_filled(
    start: int, num_tokens: int, cleared: tuple[int, ...]
) -> None:
    assert build(ScheduledSequence(make_sequence(0, 8, [6, 7]), start, num_tokens)).blocks.cleared == cleared


def test_choices_of_a_prompt_share_its_row_and_drafts_have_rows_of_their_own() -> None:
    first, second = make_sequence(1, 3, [1]), make_sequence(2, 3, [1])
    drafted, plain = make_sequence(3, 2, [4, 5]), make_sequence(4, 1, [6])
    batch = build(
        ScheduledSequence(first, 0, 3, (first, second)),
        ScheduledSequence(drafted, 1, 4, (drafted,), (7, 8, 9)),
        ScheduledSequence(plain, 0, 1, (plain,)),
    )
    assert batch.input_ids.tolist() == [100, 101, 102, 301, 7, 8, 9, 400]
    assert batch.logit_rows.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.repeats is not None
    assert batch.repeats.tolist() == [0, 0, 1, 2, 3, 4, 5]


def test_a_pending_token_is_the_sample_of_the_step_before() -> None:
    builder = BatchBuilder(4, 1)
    first, second, other = make_sequence(1, 3, [1]), make_sequence(2, 3, [1]), make_sequence(3, 1, [4])
    build(ScheduledSequence(other, 0, 1, (other,)), ScheduledSequence(first, 0, 3, (first, second)), builder=builder)
    for sequence in (first, second):
        sequence.expect()
    other.append(77)  # is known already
    decodes = [ScheduledSequence(s, s.num_tokens - 1, 1, (s,)) for s in (second, other, first)]
    batch = build(*decodes, builder=builder)
    assert batch.pending == (PendingToken(0, 2), PendingToken(2, 1))
    assert batch.input_ids.tolist() == [0, 77, 0]
    for sequence, token_id in ((first, 5), (second, 6)):
        sequence.append(token_id)
        assert (sequence.token_ids[-1], sequence.num_tokens) == (token_id, 4)
    assert build(*decodes, builder=builder).pending == ()


def test_segments_are_runs_of_one_variant() -> None:
    a, b = Variant(4, "a"), Variant(9, "b")
    sequences = [make_sequence(i, 4, [i], variant=v) for i, v in enumerate([None, a, a, b, None])]
    items = [ScheduledSequence(s, 0, 2 + i, (s,) if i != 1 else ()) for i, s in enumerate(sequences[:3])]
    items += [ScheduledSequence(s, 3, 1, (s,)) for s in sequences[3:]]
    batch = build(*items)
    assert batch.segments == (RowSegment(2, 9, 4), RowSegment(9, 10, 9))
    assert batch.logit_segments == (RowSegment(1, 2, 4), RowSegment(2, 3, 9))


def test_the_logits_of_a_prompt_are_wanted_in_pieces_up_to_its_end() -> None:
    variant = Variant(3, "v")
    sequence = make_sequence(1, 100, list(range(26)), variant=variant, prompt_logprobs=2)
    other = make_sequence(2, 10, [30, 31, 32])
    items = (ScheduledSequence(other, 0, 10, (other,)), ScheduledSequence(sequence, 20, 80, (sequence,)))
    assert prompt_targets(items[1]) == range(21, 100)
    batch = build(*items)
    assert batch.prompt_rows == (PromptRows(10, 74, 3), PromptRows(74, 89, 3))
    sequence.append(5)
    decode = ScheduledSequence(sequence, 100, 1, (sequence,))
    assert list(prompt_targets(decode)) == []
    assert build(decode).prompt_rows == ()


def test_a_batch_can_be_sent_to_another_process() -> None:
    sequence = make_sequence(1, 9, [5, 2, 7], variant=Variant(2, "x"), prompt_logprobs=0)
    batch = build(ScheduledSequence(sequence, 0, 9, (sequence,)))
    copy = pickle.loads(pickle.dumps(batch))
    for name in StepBatch.__slots__:
        assert np.array_equal(getattr(copy, name), getattr(batch, name)) or getattr(copy, name) == getattr(batch, name)
