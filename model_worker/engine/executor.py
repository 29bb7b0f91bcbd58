"""What the engine needs of whatever computes its steps: a model runner, several of them, or a fake in tests."""

from __future__ import annotations

from typing import Protocol

from model_worker.engine.step import SchedulerOutput, StepResult


class Executor(Protocol):
    """Computes steps over a paged KV cache that it owns.

    Attributes:
        num_blocks: blocks in the KV cache.
        block_size: tokens in a block.
        vocab_size: number of token ids that the model knows.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Copy blocks, write K and V of all scheduled tokens, and sample where asked. Blocks until done."""
        ...
