"""Which tokens are computed in the next step. Pure Python; no torch.

Continuous batching with chunked prefill (Orca, OSDI'22; Sarathi-Serve, arXiv 2403.02310). Sequences are served in the
order of (priority, arrival). Every step has a budget of `max_num_batched_tokens`, spent in this order:

    1. decoding sequences   one token each; there is always room for all of them
    2. prompts              in chunks; beside decoding sequences no more than `max_mixed_prefill_tokens` in all, so that
                            a long prompt does not hold up those that stream; as many times that as there are more
                            prompts to compute than sequences that stream, so that few streams do not hold up a crowd
    3. drafts               while no prompt is under way: guesses at the next tokens of decoding sequences (see
                            speculation), never at the price of a preemption

    the prompts' budget     [ first half            | second half                                        ]
                            the first one in order    the one with the fewest tokens left, then the next

So a short prompt passes a long one, and the long one still advances in every step. A waiting prompt is admitted when
tokens of this budget fall to it, with blocks for all its tokens, so that a prompt under way does not lack blocks
half-way. (Layers of limited sight take and give back blocks as it advances. Should none be free then, it is left out of
the step, and nobody is admitted before it goes on.) It may pass others that wait only while there would still be room
for the first of them: nobody waits for ever.

Sequences whose variant (LoRA adapter) is not active are passed over until it is; one that has waited for that too long
is again one for whom there must be room. A step's sequences are in the order of their variants, the base's first, so
that the rows of a variant lie together.

When a decoding sequence needs a block and none is free, the last running sequence in order is preempted: it waits in
its old place, and either its blocks are swapped to the host pool and back, or it loses them and is computed again from
its tokens (whose full blocks the prefix cache may still hold); PreemptionCost chooses. Because the first in order is
never preempted while others run, and a sequence is accepted only when it fits the cache alone, every accepted sequence
finishes, unless requests of a better priority never end.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from itertools import islice

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig
from model_worker.engine.lora.variant_gate import OpenGate, VariantGate
from model_worker.engine.outputs import FinishReason
from model_worker.engine.preemption import Preemption
from model_worker.engine.prompt_share import PromptShare
from model_worker.engine.running_sequences import RunningSequences, num_slots
from model_worker.engine.sequence import Sequence, SequenceGroup, SequenceStatus
from model_worker.engine.sequence_queue import rank
from model_worker.engine.speculation.speculator import Speculator
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_drafts import StepDrafts
from model_worker.engine.step_in_progress import StepInProgress
from model_worker.engine.waiting_room import WaitingRoom
from registry.errors import InvalidRequestError, RateLimitError


class Scheduler:
    """Holds all unfinished requests and makes one SchedulerOutput a step.

    Args:
        speculator: guesses tokens of decoding sequences; None: nobody does.
        gate: says whose variant is active; None: there are no variants.

    Attributes:
        left_out: somebody was left out of the last step who will lack blocks until the steps under way are done, or
            somebody is preempted.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        *,
        clock: Callable[[], float] = time.monotonic,
        speculator: Speculator | None = None,
        gate: VariantGate | None = None,
    ) -> None:
        self.config = config
        self.block_manager = block_manager
        self.groups: dict[str, SequenceGroup] = {}
        self.running = RunningSequences(config.max_num_seqs)
        self.left_out = False
        self._prompt_lacks_blocks = False  # one was left out of the last step
        self._drafts = None if speculator is None else StepDrafts(speculator, block_manager, config)
        self._gate: VariantGate = OpenGate() if gate is None else gate
        self.waiting = WaitingRoom(self._gate, clock)
        self.preemption = Preemption(block_manager)
        self.num_drafts = 0
        self.num_accepted_drafts = 0
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
                retry_after_s=self.waiting.refuse(),
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

    def abort_broken(self, request_id: str) -> None:
        """As `abort`, and let nobody find its blocks: whoever begins alike would get the same broken numbers."""
        for sequence in self.groups[request_id].sequences:
            self.block_manager.forget(sequence)
        self.abort(request_id)

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

    def schedule(self, *, ahead: bool = False) -> SchedulerOutput:
        """Choose the work of the next step; empty when there is none, or all that wait do so for their variants.

        Args:
            ahead: the step before is still being computed, and what it samples is pending. Nobody is preempted then:
                who lacks blocks is left out (`left_out`), as is who gets its last token there. Nothing is guessed.
        """
        step = StepInProgress(ahead=ahead)
        prompts = self._schedule_decodes(step)
        self._schedule_prompts(prompts, step)
        if not ahead:
            while self.running and not step.scheduled:  # prompts under way wait for each other's blocks
                prompts.remove(self.running.last)
                self._preempt(self.running.last, step)
                self._schedule_prompts(prompts, step)
            assert step.scheduled or next(self.waiting.admissible(), None) is None, "requests wait for ever"
            if self._drafts is not None and not prompts:
                self._drafts.add(step, num_running=len(self.running))
        self.left_out = step.left_out
        return step.output()

    def complete(self, output: SchedulerOutput) -> None:
        """Account for an executed step, before its samples are appended."""
        enter_computed = self.block_manager.enter_computed
        for sequence, start, num_tokens, sampled, drafts in output.scheduled:
            self.num_drafts += len(drafts)
            sequence.num_computed_tokens = start + num_tokens - len(drafts)
            enter_computed(sequence)
            for sibling in sampled[1:]:
                sibling.num_computed_tokens = start + num_tokens
                enter_computed(sibling)

    def expect(self, output: SchedulerOutput) -> None:
        """Account for a step as if it were done, so that the one after it can be scheduled. `confirm` follows.

        Its samples become pending tokens, unless it has drafts: nobody knows how many tokens those will yield.
        """
        for sequence, start, num_tokens, sampled, drafts in output.scheduled:
            self.num_drafts += len(drafts)
            if sequence.finished:
                continue
            for each in sampled or (sequence,):
                each.num_computed_tokens = start + num_tokens - len(drafts)
                if sampled and not drafts:
                    each.expect()

    def confirm(self, output: SchedulerOutput) -> None:
        """An expected step is done: what it has computed may be shared. Before its samples are appended."""
        for sequence, _, _, sampled, _ in output.scheduled:
            for each in sampled or (sequence,):
                if not each.finished:
                    self.block_manager.enter_computed(each)

    def must_precede(self, output: SchedulerOutput) -> bool:
        """The samples of this step have to be known before the next one can be scheduled."""
        return self.left_out or any(
            item.drafts or any(sequence.sampling.depends_on_output for sequence in item.sampled)
            for item in output.scheduled
        )

    def would_draft(self, output: SchedulerOutput) -> bool:
        """Whether guesses at what follows the tokens of a finished step would pay. No token is pending."""
        return self._drafts is not None and self._drafts.would_pay(output)

    def accept(self, sequence: Sequence, num_drafts: int) -> None:
        """The first drafts of a completed step were right, and have been appended: their KV is that of the tokens.

        What the other drafts wrote lies past `num_computed_tokens`, where it is never read and soon written over.
        """
        self.num_accepted_drafts += num_drafts
        sequence.num_computed_tokens += num_drafts
        self.block_manager.enter_computed(sequence)

    def observe(self, output: SchedulerOutput, *, seconds: float, swap_s: float) -> None:
        """Take note of how long a step took, `swap_s` of it for swapping."""
        computing_s = seconds - swap_s
        self.preemption.observe(output, computing_s=computing_s, swap_s=swap_s)
        if self._drafts is not None and output.num_tokens - output.num_drafts == len(output.scheduled):
            self._drafts.step_time.observe(output.num_tokens, computing_s)

    def redo_swapped(self, output: SchedulerOutput) -> None:
        """The step failed, and with it perhaps its swapping: who was swapped by it is computed again."""
        for sequence in output.swapped:
            if sequence.status is SequenceStatus.RUNNING:
                self._restart(sequence)
            elif not sequence.finished:
                self.block_manager.release(sequence)
                sequence.status = SequenceStatus.WAITING

    def redo_without_drafts(self, sequence: Sequence) -> None:
        """A row of a running sequence's drafts was not finite: compute it again, and guess nothing for it any more.

        Attention multiplies what a row does not see by zero (see ops/paged_attention), which NaN survives: a draft can
        have spoiled the rows before it, in this step and as long as its keys and values are in the cache.
        """
        self.block_manager.forget(sequence)
        self._restart(sequence)
        sequence.preempted = True
        sequence.may_have_drafts = False

    def check_integrity(self) -> None:
        """Recount blocks, queues and the variants that are held.

        Raises:
            AssertionError: something leaked or is held twice.
        """
        self.block_manager.check_integrity(self.running, self.waiting.swapped())
        self.running.check_integrity()
        self.waiting.check_integrity()
        live = {s for g in self.groups.values() for s in (g.sequences if g.forked else g.sequences[:1])}
        assert {s for s in live if not s.finished} == {*self.running, *self.waiting}
        self._gate.check_integrity(self.running, self.waiting)

    # ------------------------------------------------------------------------------------------ internal

    def _schedule_decodes(self, step: StepInProgress) -> list[Sequence]:
        """Schedule the running sequences that have one token left to compute; returns the others, in order."""
        prompts: list[Sequence] = []
        for sequence in self.running.snapshot():
            if sequence.status is not SequenceStatus.RUNNING:  # preempted in this step
                continue
            start = sequence.num_computed_tokens
            if len(sequence.token_ids) - start > 1:
                prompts.append(sequence)
                continue
            if sequence.num_pending_tokens and sequence.num_tokens_left == 0:
                continue
            while (copies := self.block_manager.grow(sequence)) is None:
                if step.ahead:
                    step.left_out = True
                    break
                victim = self.running.last  # not scheduled yet: the walk is in the order of the queue
                self._preempt(victim, step)
                if victim is sequence:
                    break
            else:
                if copies:
                    step.block_copies += copies
                step.scheduled.append(ScheduledSequence(sequence, start, 1, self._sampled(sequence)))
        return prompts

    def _schedule_prompts(self, prompts: list[Sequence], step: StepInProgress) -> None:
        """Share what is left of the step's budget among the prompts under way, in order, and those that wait."""
        num_decodes = len(step.scheduled)
        budget = self.config.max_num_batched_tokens - num_decodes
        if num_decodes:
            newcomers = islice(self.waiting.admissible(), self.running.num_free_slots)
            num_prompts = len(prompts) + sum(1 for _ in newcomers)
            most = self.config.max_mixed_prefill_tokens
            budget = min(budget, max(most, most * num_prompts // num_decodes))
        share = PromptShare(budget)
        may_admit = not step.preempted and not (self._prompt_lacks_blocks and prompts)
        first = next(self.waiting.admissible(), None)
        if may_admit and first is not None and budget and not (prompts and prompts[0].rank < first.rank):
            may_admit = self._admit(first, prompts, step)
        if prompts:
            share.give(prompts[0], -(-budget // 2))
        while share.budget:
            shortest = min((p for p in prompts if share.num_left(p)), key=share.urgency, default=None)
            first = next(self.waiting.admissible(), None) if may_admit else None
            newcomer = None if first is None else self.waiting.shortest(first, among=self.config.max_num_seqs)
            if (
                first is not None
                and newcomer is not None
                and (shortest is None or share.urgency(newcomer) < share.urgency(shortest))
            ):
                may_admit = self._admit(newcomer, prompts, step) or (
                    newcomer is not first and self._admit(first, prompts, step)
                )
            elif shortest is not None:
                share.give(shortest, share.budget)
            else:
                break
        self._prompt_lacks_blocks = False
        for sequence, num_tokens in share.chunks.items():
            start = sequence.num_computed_tokens
            if not self.block_manager.extend(sequence, start + num_tokens):
                step.left_out = self._prompt_lacks_blocks = True
                continue
            sampled = self._sampled(sequence) if start + num_tokens == sequence.num_tokens else ()
            step.scheduled.append(ScheduledSequence(sequence, start, num_tokens, sampled))

    def _admit(self, sequence: Sequence, prompts: list[Sequence], step: StepInProgress) -> bool:
        """Let an admissible sequence run, if there is room for it and for the first one that waits in turn."""
        num_slots_wanted = num_slots(sequence)
        # A block for each running sequence stays free, so that admission does not cause the next preemption.
        reserve = len(self.running)
        first = self.waiting.first_in_turn(somebody_runs=bool(self.running))
        if first is not None and first is not sequence:
            num_slots_wanted += num_slots(first)
            reserve += self.block_manager.num_blocks_for(first.num_tokens) + 1
        if num_slots_wanted > self.running.num_free_slots:
            return False
        if sequence.status is SequenceStatus.SWAPPED:
            if not self.preemption.give_back(sequence, step, reserve=reserve):
                return False
        elif not self._admit_anew(sequence, reserve):
            return False
        self._gate.enter(sequence)
        self.waiting.start(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.running.add(sequence)
        insort(prompts, sequence, key=rank)
        return True

    def _admit_anew(self, sequence: Sequence, reserve: int) -> bool:
        cacheable = sequence.sampling.prompt_logprobs is None
        if not self.block_manager.admit(sequence, reserve=reserve, use_prefix_cache=cacheable):
            return False
        if cacheable and not sequence.preempted:  # else it would find the blocks that it computed itself
            self.num_prefix_queried_tokens += sequence.num_tokens
            self.num_prefix_hit_tokens += sequence.num_computed_tokens
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _preempt(self, sequence: Sequence, step: StepInProgress) -> None:
        self.running.remove(sequence)
        self.preemption.take_blocks(sequence, step)
        self.waiting.add(sequence)

    def _restart(self, sequence: Sequence) -> None:
        """Have a running sequence computed again, from its first token."""
        self.running.remove(sequence)
        self.block_manager.release(sequence)
        sequence.status = SequenceStatus.WAITING
        self.waiting.add(sequence)

    def _sampled(self, sequence: Sequence) -> tuple[Sequence, ...]:
        """Who samples when all tokens of a sequence are computed; makes the other choices of a prompt."""
        group = sequence.group
        assert group is not None
        if group.forked:
            return (sequence,)
        self.running.fork(group)
        for sibling in group.sequences[1:]:
            self.block_manager.fork(sequence, sibling)
            sibling.num_cached_tokens = sequence.num_cached_tokens
            sibling.status = SequenceStatus.RUNNING
            self._gate.enter(sibling)
        return tuple(group.sequences)

    def _retire(self, sequence: Sequence) -> None:
        group = sequence.group
        assert group is not None
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif not sequence.finished and (group.forked or sequence is group.sequences[0]):
            self.waiting.remove(sequence)  # the other choices of a prompt are not queued before it is forked
        self._gate.leave(sequence)
        self.block_manager.release(sequence)
        sequence.status = SequenceStatus.FINISHED
