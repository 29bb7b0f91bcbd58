"""An executor without a model: it keeps token ids where a model keeps K and V, and reads them back to sample.

The next token is a fixed function of all tokens that the block table leads to, so a wrong block, a missing copy or a
token that was never computed changes the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence as SequenceOf

from model_worker.engine.outputs import SampledToken, TokenLogprobs
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import SchedulerOutput, StepResult
from registry.errors import RootgraftError


def next_token(token_ids: SequenceOf[int], index: int, vocab_size: int) -> int:
    """The token that FakeExecutor samples after `token_ids` for choice `index`."""
    digest = hashlib.sha256(repr((list(token_ids), index)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % vocab_size


class FakeExecutor:
    """Runs steps in microseconds; `before_step` may raise or record."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        vocab_size: int = 256,
        *,
        before_step: Callable[[SchedulerOutput], None] = lambda output: None,
        fail_sample: Callable[[Sequence], RootgraftError | None] = lambda sequence: None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.steps: list[SchedulerOutput] = []
        self._before_step = before_step
        self._fail_sample = fail_sample
        self._memory: dict[tuple[int, int], int] = {}

    def execute(self, output: SchedulerOutput) -> StepResult:
        self._before_step(output)
        self.steps.append(output)
        for source, destination in output.block_copies:
            for offset in range(self.block_size):
                if (source, offset) in self._memory:
                    self._memory[destination, offset] = self._memory[source, offset]
        for item in output.scheduled:
            for position in range(item.start, item.start + item.num_tokens):
                self._memory[self._slot(item.sequence, position)] = item.sequence.token_ids[position]
        samples: list[SampledToken | RootgraftError] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for item in output.scheduled:
            end = item.start + item.num_tokens
            if item.sequence.sampling.prompt_logprobs is not None:
                known = range(item.start + 1, min(end + 1, item.sequence.num_prompt_tokens))
                prompt_logprobs[item.sequence.seq_id] = [
                    TokenLogprobs(item.sequence.token_ids[position], -float(position), ()) for position in known
                ]
            if item.sampled:
                context = [self._memory[self._slot(item.sequence, position)] for position in range(end)]
            for sequence in item.sampled:
                token_id = next_token(context, sequence.index, self.vocab_size)
                samples.append(self._fail_sample(sequence) or SampledToken(token_id, None))
        return StepResult(tuple(samples), prompt_logprobs)

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.block_size], position % self.block_size
