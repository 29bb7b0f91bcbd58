"""What is done around an embedding and an output head of which each rank has the rows of some tokens.

Hooks are around whatever computes a module, also a variant's stand-in, which so knows nothing of ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.parallel.sharding import Division, Share


def add_up_rows(embedding: nn.Module, tokens: Division, group: RankGroup) -> None:
    """The embedding, called with all ranks' token ids, gives all ranks' rows."""
    ((start, end),) = tokens.ranges(Share(group.rank, group.size))
    # Tokens beyond the vocabulary, which variants may have, are the last rank's.
    rows = _TokenRows(group, start, None if group.rank == group.size - 1 else end)
    embedding.register_forward_pre_hook(rows.before)
    embedding.register_forward_hook(rows.after)


def gather_logits(head: nn.Module, tokens: Division, group: RankGroup) -> None:
    """The head gives the logits of all ranks' tokens."""
    widths = [tokens.size(Share(rank, group.size)) for rank in range(group.size)]
    head.register_forward_hook(lambda module, args, logits: group.gather_columns(logits, widths))


class _TokenRows:
    """Rows of tokens that a rank does not have are 0 there."""

    def __init__(self, group: RankGroup, start: int, end: int | None) -> None:
        self._group = group
        self._start = start
        self._end = end
        self._others: Tensor | None = None  # of the call under way

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Token ids become rows of this rank's table."""
        token_ids, *rest = args
        others = token_ids < self._start
        if self._end is not None:
            others |= token_ids >= self._end
        self._others = others
        return (token_ids - self._start).masked_fill_(others, 0), *rest

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._others is not None
        others, self._others = self._others, None
        return self._group.all_reduce(output.masked_fill(others[..., None], 0))
