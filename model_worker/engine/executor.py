"""What the engine needs of whatever computes its steps: a model runner, several of them, or a fake in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from model_worker.engine.step import SchedulerOutput, StepResult
from model_worker.engine.visibility import Visibility
from registry.errors import InternalError


class ExecutorLostError(InternalError):
    """No step can be computed any more: the process should end."""


class PendingStep(Protocol):
    """A step that is being computed. It is computed to its end also when nobody asks for its result."""

    def result(self) -> StepResult:
        """Blocks until the step is done.

        Raises:
            Exception: it failed. Steps that were launched after it cannot be trusted either.
        """
        ...


class Executor(Protocol):
    """Computes steps over a paged KV cache that it owns.

    Attributes:
        num_blocks: blocks in the KV cache.
        num_host_blocks: blocks in the host pool that sequences are swapped to; 0: there is none.
        groups: what the layers of each layer group see; there is a block table for each.
        block_size: tokens in a block.
        vocab_size: number of token ids that the model knows.
        runs_ahead: `launch` returns before the step is done, and takes the next one in the meantime.
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

    @property
    def runs_ahead(self) -> bool: ...

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Swap and copy blocks, write K and V of all scheduled tokens, and sample where asked. Blocks until done."""
        ...

    def launch(self, output: SchedulerOutput) -> PendingStep:
        """Begin a step. Called only where `runs_ahead`.

        Steps take effect in the order of their launch: each finds the blocks as those before it leave them, and each
        pending token (see Sequence) is what the step launched last draws for it. Nothing of the sequences is looked at
        after the return.
        """
        ...
