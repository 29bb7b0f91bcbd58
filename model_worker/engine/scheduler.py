"""Which tokens are computed in the next step. Pure Python; no torch.

Continuous batching with chunked prefill (Orca, OSDI'22; Sarathi-Serve, arXiv 2403.02310). Every step has a budget of
`max_num_batched_tokens`, spent in this order:

    1. running sequences   oldest first: a decoding one takes one token, a prompt under way as large a chunk as is left;
                           the latter is always the youngest, so it never holds up one that decodes
    2. waiting sequences   first come, first served; admitted with blocks for all their tokens, so that a prompt under
                           way never lacks blocks half-way

When a decoding sequence needs a block and none is free, the youngest running sequence is preempted: it loses its
blocks, waits at the head of the queue, and is computed again from its tokens (whose full blocks the prefix cache may
still hold). Because the oldest is never preempted while others run, and a sequence is accepted only when it fits the
cache alone, every accepted sequence finishes.
"""

from __future__ import annotations

from collections import deque

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig
from model_worker.engine.outputs import FinishReason
from model_worker.engine.sequence import Sequence, SequenceGroup, SequenceStatus
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from registry.errors import InvalidRequestError, RateLimitError


class Scheduler:
    """Holds all unfinished requests and makes one SchedulerOutput a step.

    Raises:
        InvalidRequestError: the configuration cannot work.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager) -> None:
        if not 1 <= config.max_num_seqs <= config.max_num_batched_tokens:
            raise InvalidRequestError(
                f"--max-num-seqs ({config.max_num_seqs}) must be at least 1 and at most --max-num-batched-tokens "
                f"({config.max_num_batched_tokens}), because every running sequence takes a token of each step.",
                param="max_num_seqs",
            )
        self.config = config
        self.block_manager = block_manager
        self.groups: dict[str, SequenceGroup] = {}
        self.waiting: deque[Sequence] = deque()  # in order of seq_id
        self.running: list[Sequence] = []  # in order of seq_id
        self.num_preemptions = 0
        self.num_prefix_queried_tokens = 0
        self.num_prefix_hit_tokens = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.groups)

    # ------------------------------------------------------------------------------------------ requests

    def add(self, group: SequenceGroup) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: it could never run (more sequences than max_num_seqs).
            RateLimitError: the queue is full.
        """
        if group.sampling.n > self.config.max_num_seqs:
            raise InvalidRequestError(
                f"n is {group.sampling.n}, but this server runs at most {self.config.max_num_seqs} sequences at once.",
                param="n",
            )
        if len(self.waiting) >= self.config.max_num_waiting:
            raise RateLimitError(
                f"{len(self.waiting)} requests are waiting already, which is this server's limit; try again later.",
                retry_after_s=1.0,
            )
        self.groups[group.request_id] = group
        self.waiting.append(group.sequences[0])

    def abort(self, request_id: str) -> SequenceGroup | None:
        """Forget a request and release all that it holds; None when it is not (or no longer) here."""
        group = self.groups.get(request_id)
        if group is not None:
            for sequence in group.sequences:
                self._retire(sequence)
            del self.groups[request_id]
        return group

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End one sequence; the request leaves with its last one."""
        assert sequence.status is SequenceStatus.RUNNING
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        self._retire(sequence)
        group = sequence.group
        assert group is not None
        if group.finished:
            del self.groups[group.request_id]

    # ------------------------------------------------------------------------------------------ steps

    def schedule(self) -> SchedulerOutput:
        """Choose the work of the next step; empty when there is none."""
        step = _Step(self.config.max_num_batched_tokens)
        for sequence in list(self.running):
            self._continue(sequence, step)
        if not step.preempted:
            self._admit(step)
        assert step.chunks or not self.running
        return SchedulerOutput(
            scheduled=tuple(self._with_samples(*item) for item in step.chunks.items()),
            block_copies=tuple(copy for copies in step.copies.values() for copy in copies),
        )

    def complete(self, output: SchedulerOutput) -> None:
        """Account for an executed step, before its samples are appended."""
        for item in output.scheduled:
            for sequence in {item.sequence, *item.sampled}:
                sequence.num_computed_tokens = item.start + item.num_tokens
                self.block_manager.enter_computed(sequence)

    def check_integrity(self) -> None:
        """Recount blocks and queues.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        self.block_manager.check_integrity(self.running)
        assert [s.seq_id for s in self.running] == sorted(s.seq_id for s in self.running)
        assert [s.seq_id for s in self.waiting] == sorted(s.seq_id for s in self.waiting)
        live = {s for g in self.groups.values() for s in (g.sequences if g.forked else g.sequences[:1])}
        assert {s for s in live if not s.finished} == {*self.running, *self.waiting}
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.waiting)

    # ------------------------------------------------------------------------------------------ internal

    def _continue(self, sequence: Sequence, step: _Step) -> None:
        """Schedule a running sequence, preempting younger ones, or at last itself, when blocks are lacking."""
        if sequence.status is not SequenceStatus.RUNNING or step.budget == 0:
            return
        while (copies := self.block_manager.grow(sequence)) is None:
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return
        step.add(sequence, copies)

    def _admit(self, step: _Step) -> None:
        num_slots = self.config.max_num_seqs - sum(self._num_slots(s) for s in self.running)
        while self.waiting and step.budget > 0:
            sequence = self.waiting[0]
            # A block for each running sequence stays free, so that admission does not cause the next preemption.
            cacheable = sequence.sampling.prompt_logprobs is None
            if self._num_slots(sequence) > num_slots or not self.block_manager.admit(
                sequence, reserve=len(self.running), use_prefix_cache=cacheable
            ):
                return
            num_slots -= self._num_slots(sequence)
            self.waiting.popleft()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            if cacheable and not sequence.preempted:  # else it would find the blocks that it computed itself
                self.num_prefix_queried_tokens += sequence.num_tokens
                self.num_prefix_hit_tokens += sequence.num_computed_tokens
                sequence.num_cached_tokens = sequence.num_computed_tokens
            step.add(sequence, [])

    def _num_slots(self, sequence: Sequence) -> int:
        """Sequences that this one stands for: an unforked prompt keeps room for all choices of its request."""
        group = sequence.group
        assert group is not None
        return 1 if group.forked else len(group.sequences)

    def _preempt(self, sequence: Sequence, step: _Step) -> None:
        step.remove(sequence)
        self.block_manager.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.preempted = True
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _with_samples(self, sequence: Sequence, num_tokens: int) -> ScheduledSequence:
        start = sequence.num_computed_tokens
        group = sequence.group
        assert group is not None
        if start + num_tokens < sequence.num_tokens:
            return ScheduledSequence(sequence, start, num_tokens)
        sampled = [sequence]
        if not group.forked:
            group.forked = True
            position = self.running.index(sequence) + 1
            for sibling in group.sequences[1:]:
                self.block_manager.fork(sequence, sibling)
                sibling.num_cached_tokens = sequence.num_cached_tokens
                sibling.status = SequenceStatus.RUNNING
                sampled.append(sibling)
            self.running[position:position] = group.sequences[1:]
        return ScheduledSequence(sequence, start, num_tokens, tuple(sampled))

    def _retire(self, sequence: Sequence) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self.block_manager.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED


class _Step:
    """A step while it is being put together: what each sequence computes, and the block copies it needs first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: dict[Sequence, int] = {}
        self.copies: dict[Sequence, list[tuple[int, int]]] = {}
        self.preempted = False

    def add(self, sequence: Sequence, copies: list[tuple[int, int]]) -> None:
        num_tokens = min(sequence.num_tokens - sequence.num_computed_tokens, self.budget)
        self.chunks[sequence] = num_tokens
        self.copies[sequence] = copies
        self.budget -= num_tokens

    def remove(self, sequence: Sequence) -> None:
        self.preempted = True
        self.budget += self.chunks.pop(sequence, 0)
        self.copies.pop(sequence, None)
