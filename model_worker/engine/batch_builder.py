"""From a SchedulerOutput to a StepBatch: sequences become arrays. No torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import accumulate, groupby

import numpy as np
import numpy.typing as npt

from model_worker.engine.lora.variant import Variant
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_batch import BlockMoves, PendingToken, PromptRows, RowSegment, StepBatch

_PROMPT_ROWS = 64  # of a prompt, whose logits are held at once


class BatchBuilder:
    """Makes the batches of one engine, in the order in which they are launched.

    It remembers which sample of the last batch belongs to which sequence: that is where a token comes from that is
    still pending.

    Args:
        block_size: tokens in a KV cache block.
        num_groups: layer groups.
    """

    def __init__(self, block_size: int, num_groups: int) -> None:
        self._block_size = block_size
        self._num_groups = num_groups
        self._last_samples: dict[int, int] = {}  # seq_id to its sample

    def build(self, output: SchedulerOutput) -> StepBatch:
        scheduled = output.scheduled
        seq_lens = tuple([item.start + item.num_tokens for item in scheduled])
        query_start = (0, *accumulate([item.num_tokens for item in scheduled]))
        starts = np.array([item.start for item in scheduled], dtype=np.int64)
        sequence_of = np.arange(len(scheduled))  # [T]
        if query_start[-1] == len(scheduled):
            positions = starts
            input_ids = [item.sequence.token_ids[item.start] for item in scheduled]
        else:
            lengths = np.diff(query_start)
            sequence_of = np.repeat(sequence_of, lengths)
            positions = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], lengths)
            input_ids = _input_ids(scheduled)
        tables = self._block_tables(scheduled, seq_lens)
        blocks = tables[:, sequence_of, positions // self._block_size].astype(np.int64)  # [G, T]
        pending = self._pending(scheduled, query_start)
        rows, repeats = self._logit_rows(scheduled, query_start)
        return StepBatch(
            input_ids=np.array(input_ids, dtype=np.int64),
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            block_tables=tables,
            query_start=query_start,
            seq_lens=seq_lens,
            blocks=BlockMoves(output.swap_out, output.swap_in, output.block_copies, self._cleared(scheduled)),
            pending=pending,
            segments=_segments([(item.sequence.variant, item.num_tokens) for item in scheduled]),
            logit_rows=np.array(rows, dtype=np.int64),
            logit_segments=_segments(
                [(item.sequence.variant, 1 + len(item.drafts)) for item in scheduled if item.sampled]
            ),
            repeats=None if repeats is None else np.array(repeats, dtype=np.int64),
            prompt_rows=_prompt_rows(scheduled, query_start),
        )

    def _block_tables(
        self, scheduled: SequenceOf[ScheduledSequence], seq_lens: SequenceOf[int]
    ) -> npt.NDArray[np.int32]:
        """[G, S, max_blocks], filled up with block 0."""
        num_blocks = [-(-seq_len // self._block_size) for seq_len in seq_lens]
        tables = np.zeros((self._num_groups, len(scheduled), max(num_blocks)), dtype=np.int32)
        for row, (item, num) in enumerate(zip(scheduled, num_blocks, strict=True)):
            for group, table in enumerate(item.sequence.block_tables):
                tables[group, row, :num] = table[:num]
        return tables

    def _cleared(self, scheduled: SequenceOf[ScheduledSequence]) -> tuple[int, ...]:
        """Blocks whose first slot is written, but not all of them. At most one a sequence and group, the last."""
        cleared: list[int] = []
        for item in scheduled:
            end = item.start + item.num_tokens
            index = end // self._block_size  # of the last block, if it stays incomplete
            if item.start <= index * self._block_size < end:
                cleared += [table[index] for table in item.sequence.block_tables]
        return tuple(cleared)

    def _pending(
        self, scheduled: SequenceOf[ScheduledSequence], query_start: SequenceOf[int]
    ) -> tuple[PendingToken, ...]:
        """Which of a sequence's tokens is pending: the last, and only while it decodes."""
        return tuple(
            [
                PendingToken(start, self._last_samples[item.sequence.seq_id])
                for item, start in zip(scheduled, query_start, strict=False)
                if item.sequence.num_pending_tokens
            ]
        )

    def _logit_rows(
        self, scheduled: SequenceOf[ScheduledSequence], query_start: SequenceOf[int]
    ) -> tuple[list[int], list[int] | None]:
        """Tokens whose logits are sampled, and for each sample its place among them, should that be another."""
        if query_start[-1] == len(scheduled) and all(len(item.sampled) == 1 for item in scheduled):
            self._last_samples = {item.sampled[0].seq_id: place for place, item in enumerate(scheduled)}
            return list(range(len(scheduled))), None
        rows: list[int] = []
        places: list[int] = []
        last_samples: dict[int, int] = {}
        for item, end in zip(scheduled, query_start[1:], strict=True):
            if not item.sampled:
                continue
            for sequence in item.sampled:
                last_samples[sequence.seq_id] = len(places)
                places.append(len(rows))
            first = end - 1 - len(item.drafts)  # the last one that is known
            places += range(len(rows) + 1, len(rows) + 1 + len(item.drafts))
            rows += range(first, end)
        self._last_samples = last_samples
        return rows, None if len(rows) == len(places) else places


def prompt_targets(item: ScheduledSequence) -> range:
    """Positions of the prompt's tokens whose logprobs follow from an item's rows; none where nobody asks for them."""
    sequence = item.sequence
    if sequence.sampling.prompt_logprobs is None:
        return range(0)
    return range(item.start + 1, min(item.start + item.num_tokens + 1, sequence.num_prompt_tokens))


def _prompt_rows(scheduled: SequenceOf[ScheduledSequence], query_start: SequenceOf[int]) -> tuple[PromptRows, ...]:
    pieces: list[PromptRows] = []
    for item, first in zip(scheduled, query_start, strict=False):
        if item.sequence.sampling.prompt_logprobs is None:
            continue
        variant = item.sequence.variant
        num_rows = len(prompt_targets(item))
        for start in range(0, num_rows, _PROMPT_ROWS):
            end = min(start + _PROMPT_ROWS, num_rows)
            pieces.append(PromptRows(first + start, first + end, None if variant is None else variant.number))
    return tuple(pieces)


def _input_ids(scheduled: SequenceOf[ScheduledSequence]) -> list[int]:
    input_ids: list[int] = []
    for sequence, start, num_tokens, _, drafts in scheduled:
        input_ids += sequence.token_ids[start : start + num_tokens]
        input_ids += drafts
    return input_ids


def _segments(runs: SequenceOf[tuple[Variant | None, int]]) -> tuple[RowSegment, ...]:
    """Of runs of rows, in order; one for each variant, where the runs are sorted by it."""
    if all(variant is None for variant, _ in runs):
        return ()
    segments = []
    end = 0
    for variant, group in groupby(runs, key=lambda run: run[0]):
        start, end = end, end + sum(num_rows for _, num_rows in group)
        if variant is not None:
            segments.append(RowSegment(start, end, variant.number))
    return tuple(segments)
