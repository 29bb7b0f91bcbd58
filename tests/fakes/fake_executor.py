"""An executor without a model: it keeps token ids where a model keeps K and V, and reads them back to sample.

The next token is a fixed function of all tokens that the block tables lead to and that the layers of each group can
see, and of the variants that they were computed with, so a wrong block, a missing copy, a token that was never computed
or another variant's blocks change the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence as SequenceOf

from model_worker.engine.outputs import SampledToken, TokenLogprobs
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import SchedulerOutput, StepResult
from model_worker.engine.visibility import Visibility
from registry.errors import RootgraftError

EVERYTHING = (Visibility(),)


Computed = int | tuple[int, str]
"""A token in the cache, with the digest of the variant that computed it."""


def next_token(
    token_ids: SequenceOf[int],
    index: int,
    vocab_size: int,
    groups: SequenceOf[Visibility] = EVERYTHING,
    variant: str | None = None,
) -> int:
    """The token that FakeExecutor samples after `token_ids` for choice `index` of the variant of this digest."""
    computed = [token_id if variant is None else (token_id, variant) for token_id in token_ids]
    return _draw([computed[group.first_visible(len(token_ids) - 1) :] for group in groups], index, vocab_size)


def _draw(visible: SequenceOf[SequenceOf[Computed]], index: int, vocab_size: int) -> int:
    digest = hashlib.sha256(repr((visible, index)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % vocab_size


class DoneStep:
    """A pending step whose result, or failure, is there already."""

    def __init__(self, result: StepResult | Exception) -> None:
        self._result = result

    def result(self) -> StepResult:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


class FakeExecutor:
    """Runs steps in microseconds; `before_step` may raise or record."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 256,
        *,
        num_host_blocks: int = 0,
        groups: SequenceOf[Visibility] = EVERYTHING,
        before_step: Callable[[SchedulerOutput], None] = lambda output: None,
        fail_sample: Callable[[Sequence], RootgraftError | None] = lambda sequence: None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.runs_ahead = False
        self.num_host_blocks = num_host_blocks
        self.groups = groups
        self.steps: list[SchedulerOutput] = []
        self._before_step = before_step
        self._fail_sample = fail_sample
        self._memory: dict[tuple[int, int], Computed] = {}  # by block and offset
        self._host_memory: dict[tuple[int, int], Computed] = {}

    def execute(self, output: SchedulerOutput) -> StepResult:
        self._before_step(output)
        self.steps.append(output)
        self._copy(self._memory, self._host_memory, output.swap_out)
        self._copy(self._host_memory, self._memory, output.swap_in)
        self._copy(self._memory, self._memory, output.block_copies)
        for item in output.scheduled:
            token_ids = item.sequence.token_ids[item.start : item.start + item.num_tokens] + list(item.drafts)
            assert len(token_ids) == item.num_tokens
            for position, token_id in enumerate(token_ids, item.start):
                for g in range(len(self.groups)):
                    self._memory[self._slot(item.sequence, g, position)] = _computed(token_id, item.sequence)
        samples: list[SampledToken | RootgraftError] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for item in output.scheduled:
            end = item.start + item.num_tokens - len(item.drafts)
            if item.sequence.sampling.prompt_logprobs is not None:
                known = range(item.start + 1, min(end + 1, item.sequence.num_prompt_tokens))
                prompt_logprobs[item.sequence.seq_id] = [
                    TokenLogprobs(item.sequence.token_ids[position], -float(position), ()) for position in known
                ]
            for last in range(end, item.start + item.num_tokens + 1):
                visible = [self._visible(item.sequence, g, item.start, last) for g in range(len(self.groups))]
                for sequence in item.sampled:
                    token_id = self.token_after(visible, sequence.index)
                    samples.append(self._fail_sample(sequence) or SampledToken(token_id, None))
        return StepResult(tuple(samples), prompt_logprobs)

    def launch(self, output: SchedulerOutput) -> DoneStep:
        """Only for executors that run ahead, which this one does not."""
        raise AssertionError("launched, although it does not run ahead")

    def token_after(self, visible: list[list[Computed]], index: int) -> int:
        """What choice `index` samples after tokens of which each group sees `visible`."""
        return _draw(visible, index, self.vocab_size)

    def _visible(self, sequence: Sequence, group: int, start: int, end: int) -> list[Computed]:
        """Tokens that the last of [start, end) sees; what the others see must be there as well."""
        first_visible = self.groups[group].first_visible
        tokens = [self._memory[self._slot(sequence, group, p)] for p in range(first_visible(start), end)]
        return tokens[first_visible(end - 1) - first_visible(start) :]

    def _copy(
        self,
        source: dict[tuple[int, int], Computed],
        target: dict[tuple[int, int], Computed],
        pairs: SequenceOf[tuple[int, int]],
    ) -> None:
        """Whole blocks; all are read before any is written, and what a block held before is gone."""
        read = [(b, [source.get((a, offset)) for offset in range(self.block_size)]) for a, b in pairs]
        for block, tokens in read:
            for offset, token in enumerate(tokens):
                target.pop((block, offset), None)
                if token is not None:
                    target[block, offset] = token

    def _slot(self, sequence: Sequence, group: int, position: int) -> tuple[int, int]:
        return sequence.block_tables[group][position // self.block_size], position % self.block_size


def _computed(token_id: int, sequence: Sequence) -> Computed:
    if sequence.variant is None:
        return token_id
    assert sequence.variant.bound is not None, "it is computed with a variant that is not active"
    return token_id, sequence.variant.digest
