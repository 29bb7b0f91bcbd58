"""Steps on rank 0: the other ranks get every batch that this one computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

from torch import Tensor

from model_worker.engine.extra_logits import ExtraLogits
from model_worker.engine.lora.bound_variant import BoundVariant
from model_worker.engine.parallel.ranks import Ranks
from model_worker.engine.parallel.shared_variants import SharedVariant
from model_worker.engine.step_batch import BlockMoves, PromptRows, StepBatch
from model_worker.engine.step_runner import BoundVariants, StepRunner

T = TypeVar("T")


class LeadingSteps(StepRunner):
    """A StepRunner whose calls for a batch are made on all ranks, by each in the same order.

        rank 0    forward ──send──► | drawn ──broadcast──► | forward | prompt_logits, one after another | logits |
        others                      | only if one is pending | forward | prompt_logits, one after another | logits |

    A call that fails on one rank leaves the others waiting, so that no step after it can succeed: then the ranks are
    lost. Where rank 0 does not come to a batch's last calls, it makes up for them before the next batch.
    """

    def __init__(self, own: StepRunner, ranks: Ranks) -> None:
        self._own = own
        self._ranks = ranks
        self._owed: list[Callable[[], Tensor]] = []  # calls for the last batch that the others make

    def move_blocks(self, moves: BlockMoves) -> None:
        with self._ranks.waiting():  # swapping waits for the step before it
            self._together(partial(self._own.move_blocks, moves))

    def forward(self, batch: StepBatch, variants: BoundVariants) -> Tensor:
        while self._owed:
            self._together(self._owed.pop(0))
        own, numbers = _split(variants)
        self._ranks.send_step(batch, numbers)
        if batch.pending:
            self._together(partial(self._ranks.group.broadcast, self._own.drawn))
        hidden = self._together(partial(self._own.forward, batch, own))
        self._owed = [partial(self._own.prompt_logits, rows, hidden, own) for rows in batch.prompt_rows]
        if len(batch.logit_rows):
            self._owed.append(partial(self._own.logits, batch, hidden, own))
        return hidden

    def remember(self, tokens: Tensor) -> None:
        self._own.remember(tokens)

    def prompt_logits(self, rows: PromptRows, hidden: Tensor, variants: BoundVariants) -> Tensor:
        return self._together(self._owed.pop(0))

    def logits(self, batch: StepBatch, hidden: Tensor, variants: BoundVariants) -> Tensor:
        return self._together(self._owed.pop(0))

    def extra_logits(self, batch: StepBatch, hidden: Tensor, variants: BoundVariants) -> list[ExtraLogits]:
        return self._own.extra_logits(batch, hidden, _split(variants)[0])

    def waiting(self) -> AbstractContextManager[None]:
        return self._ranks.waiting()

    def _together(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            raise self._ranks.lost(error) from error


def _split(variants: BoundVariants) -> tuple[dict[int, BoundVariant], dict[int, int]]:
    """What rank 0 has bound, and the numbers under which the others have, by the numbers in a batch."""
    shared: dict[int, SharedVariant] = {}
    for number, variant in variants.items():
        assert isinstance(variant, SharedVariant)
        shared[number] = variant
    own = {number: variant.own for number, variant in shared.items()}
    return own, {number: variant.number for number, variant in shared.items()}
