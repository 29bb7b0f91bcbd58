"""A fake executor that runs ahead: it computes StepBatches, and keeps what it has drawn to itself until it is asked.

As FakeExecutor, it keeps token ids where a model keeps K and V. All that it knows of a step is its StepBatch, made when
the step is launched; it fills in the pending tokens from what it drew in the step before.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence as SequenceOf
from typing import Any

from model_worker.engine.batch_builder import BatchBuilder, prompt_targets
from model_worker.engine.outputs import SampledToken, TokenLogprobs
from model_worker.engine.step import SchedulerOutput, StepResult
from model_worker.engine.step_batch import StepBatch
from registry.errors import RootgraftError
from tests.fakes.fake_executor import Computed, DoneStep, FakeExecutor


class AheadExecutor(FakeExecutor):
    """Args:
    fail_result: asked when the result of a step is; the step fails with the error that it returns.
    more: as of FakeExecutor.
    """

    def __init__(
        self, *args: Any, fail_result: Callable[[SchedulerOutput], Exception | None] = lambda output: None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.runs_ahead = True
        self._fail_result = fail_result
        self._builder = BatchBuilder(self.block_size, len(self.groups))
        self._drawn: list[int] = []  # by the last step
        self.num_pending = 0

    def execute(self, output: SchedulerOutput) -> StepResult:
        raise AssertionError("executed, although it runs ahead")

    def launch(self, output: SchedulerOutput) -> DoneStep:
        self._before_step(output)
        self.steps.append(output)
        batch: StepBatch = pickle.loads(pickle.dumps(self._builder.build(output)))
        digests = {s.variant.number: s.variant.digest for s in (i.sequence for i in output.scheduled) if s.variant}
        self._write(batch, digests)
        visible_of_row = [self._visible_to(batch, int(row)) for row in batch.logit_rows]
        rows = range(len(visible_of_row)) if batch.repeats is None else [int(row) for row in batch.repeats]
        choices = [
            sequence for item in output.scheduled for sequence in item.sampled for _ in range(1 + len(item.drafts))
        ]
        self._drawn = [
            self.token_after(visible_of_row[row], sequence.index) for row, sequence in zip(rows, choices, strict=True)
        ]
        samples: list[SampledToken | RootgraftError] = [
            self._fail_sample(sequence) or SampledToken(token_id, None)
            for token_id, sequence in zip(self._drawn, choices, strict=True)
        ]
        prompt_logprobs = {
            item.sequence.seq_id: [
                TokenLogprobs(item.sequence.token_ids[position], -float(position), ())
                for position in prompt_targets(item)
            ]
            for item in output.scheduled
            if item.sequence.sampling.prompt_logprobs is not None
        }
        return DoneStep(self._fail_result(output) or StepResult(tuple(samples), prompt_logprobs))

    def _write(self, batch: StepBatch, digests: dict[int, str]) -> None:
        self._copy(self._memory, self._host_memory, batch.blocks.swap_out)
        self._copy(self._host_memory, self._memory, batch.blocks.swap_in)
        self._copy(self._memory, self._memory, batch.blocks.copies)
        token_ids = batch.input_ids.tolist()
        for place, sample in batch.pending:
            token_ids[place] = self._drawn[sample]
        self.num_pending += len(batch.pending)
        computed: list[Computed] = list(token_ids)
        for start, end, variant in batch.segments:
            computed[start:end] = [(token_id, digests[variant]) for token_id in token_ids[start:end]]
        for slots in batch.slot_mapping:
            for slot, token in zip(slots.tolist(), computed, strict=True):
                self._memory[divmod(slot, self.block_size)] = token

    def _visible_to(self, batch: StepBatch, row: int) -> list[list[Computed]]:
        """What each group's layers see from a token of the batch."""
        sequence = max(s for s in range(batch.num_sequences) if batch.query_start[s] <= row)
        position = int(batch.positions[row])
        return [
            [
                self._memory[int(table[p // self.block_size]), p % self.block_size]
                for p in range(group.first_visible(position), position + 1)
            ]
            for group, table in zip(self.groups, self._tables(batch, sequence), strict=True)
        ]

    def _tables(self, batch: StepBatch, sequence: int) -> SequenceOf[SequenceOf[int]]:
        return [tables[sequence].tolist() for tables in batch.block_tables]
