"""What the engine needs of whatever computes its steps: a model runner, several of them, or a fake in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from model_worker.engine.step import SchedulerOutput, StepResult
from model_worker.engine.visibility import Visibility


class Executor(Protocol):
    """Computes steps over a paged KV cache that it owns.

    Attributes:
        num_blocks: blocks in the KV cache.
        num_host_blocks: blocks in the host pool that sequences are swapped to; 0: there is none.
        groups: what the layers of each layer group see; there is a block table for each.
        block_size: tokens in a block.
        vocab_size: number of token ids that the model knows.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_host_blocks(self) -> int: ...

    @property
    def groups(self) -> Sequence[Visibility]: ...

    @property
    def block_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Swap and copy blocks, write K and V of all scheduled tokens, and sample where asked. Blocks until done."""
        ...
