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

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig
from model_worker.engine.outputs import FinishReason
from model_worker.engine.sequence import Sequence, SequenceGroup, SequenceStatus
from model_worker.engine.sequence_queue import SequenceQueue
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
        self.waiting = SequenceQueue()
        self.running = SequenceQueue()
        self._num_used_slots = 0  # of max_num_seqs, by running sequences
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
        self.waiting.add(group.sequences[0])

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
        for sequence in self.running.snapshot():
            self._continue(sequence, step)
        if not step.preempted:
            self._admit(step)
        assert step.scheduled or not self.running
        return SchedulerOutput(tuple(step.scheduled), tuple(step.block_copies))

    def complete(self, output: SchedulerOutput) -> None:
        """Account for an executed step, before its samples are appended."""
        enter_computed = self.block_manager.enter_computed
        for sequence, start, num_tokens, sampled in output.scheduled:
            sequence.num_computed_tokens = start + num_tokens
            enter_computed(sequence)
            for sibling in sampled[1:]:
                sibling.num_computed_tokens = start + num_tokens
                enter_computed(sibling)

    def check_integrity(self) -> None:
        """Recount blocks and queues.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        self.block_manager.check_integrity(self.running)
        for queue in (self.running, self.waiting):
            assert [s.rank for s in queue] == sorted(s.rank for s in queue)
        assert self._num_used_slots == sum(self._num_slots(s) for s in self.running)
        live = {s for g in self.groups.values() for s in (g.sequences if g.forked else g.sequences[:1])}
        assert {s for s in live if not s.finished} == {*self.running, *self.waiting}
        assert all(not s.block_table and s.num_computed_tokens == 0 for s in self.waiting)

    # ------------------------------------------------------------------------------------------ internal

    def _continue(self, sequence: Sequence, step: _Step) -> None:
        """Schedule a running sequence, preempting younger ones, or at last itself, when blocks are lacking."""
        if sequence.status is not SequenceStatus.RUNNING or step.budget == 0:
            return
        while (copies := self.block_manager.grow(sequence)) is None:
            victim = self.running.last  # not scheduled yet: the walk is in the order of the queue
            self._preempt(victim)
            step.preempted = True
            if victim is sequence:
                return
        if copies:
            step.block_copies += copies
        self._schedule_tokens(sequence, step)

    def _admit(self, step: _Step) -> None:
        while self.waiting and step.budget > 0:
            sequence = self.waiting.first
            num_slots = self._num_slots(sequence)
            # A block for each running sequence stays free, so that admission does not cause the next preemption.
            cacheable = sequence.sampling.prompt_logprobs is None
            if self._num_used_slots + num_slots > self.config.max_num_seqs or not self.block_manager.admit(
                sequence, reserve=len(self.running), use_prefix_cache=cacheable
            ):
                return
            self._num_used_slots += num_slots
            self.waiting.remove(sequence)
            sequence.status = SequenceStatus.RUNNING
            self.running.add(sequence)
            if cacheable and not sequence.preempted:  # else it would find the blocks that it computed itself
                self.num_prefix_queried_tokens += sequence.num_tokens
                self.num_prefix_hit_tokens += sequence.num_computed_tokens
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self._schedule_tokens(sequence, step)

    def _num_slots(self, sequence: Sequence) -> int:
        """Sequences that this one stands for: an unforked prompt keeps room for all choices of its request."""
        group = sequence.group
        assert group is not None
        return 1 if group.forked else len(group.sequences)

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_running(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.preempted = True
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _schedule_tokens(self, sequence: Sequence, step: _Step) -> None:
        start = sequence.num_computed_tokens
        num_left = len(sequence.token_ids) - start
        num_tokens = min(num_left, step.budget)
        step.budget -= num_tokens
        sampled = self._sampled(sequence) if num_tokens == num_left else ()
        step.scheduled.append(ScheduledSequence(sequence, start, num_tokens, sampled))

    def _sampled(self, sequence: Sequence) -> tuple[Sequence, ...]:
        """Who samples when all tokens of a sequence are computed; makes the other choices of a prompt."""
        group = sequence.group
        assert group is not None
        if group.forked:
            return (sequence,)
        group.forked = True
        for sibling in group.sequences[1:]:
            self.block_manager.fork(sequence, sibling)
            sibling.num_cached_tokens = sequence.num_cached_tokens
            sibling.status = SequenceStatus.RUNNING
            self.running.add(sibling)
        return tuple(group.sequences)

    def _leave_running(self, sequence: Sequence) -> None:
        self._num_used_slots -= self._num_slots(sequence)
        self.running.remove(sequence)
        self.block_manager.release(sequence)

    def _retire(self, sequence: Sequence) -> None:
        group = sequence.group
        assert group is not None
        if sequence.status is SequenceStatus.RUNNING:
            self._leave_running(sequence)
        elif sequence.status is SequenceStatus.WAITING and (group.forked or sequence is group.sequences[0]):
            self.waiting.remove(sequence)  # the other choices of a prompt are not queued before it is forked
        sequence.status = SequenceStatus.FINISHED


class _Step:
    """A step while it is being put together."""

    __slots__ = ("block_copies", "budget", "preempted", "scheduled")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.scheduled: list[ScheduledSequence] = []
        self.block_copies: list[tuple[int, int]] = []
        self.preempted = False
