"""Variants of a model that is divided among ranks: rank 0 reads them, and every rank binds its share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from delta.variant_terms import VariantTerms
from model_worker.engine.lora.bound_variant import BoundVariant
from model_worker.engine.parallel.ranks import Ranks
from model_worker.engine.parallel.sharding import Division, Share
from model_worker.engine.parallel.variant_sharding import divide_variant


@dataclass(slots=True, eq=False)
class SharedVariant:
    """A `BoundVariant`.

    Attributes:
        own: rank 0's share.
        number: under which the others keep theirs, until this object is gone.
        num_bytes: of all shares where they are in one memory, else of the largest.
    """

    own: BoundVariant
    number: int
    num_bytes: int
    drop: Callable[[int], None]

    @property
    def num_extra_tokens(self) -> int:
        return self.own.num_extra_tokens

    def __del__(self) -> None:
        self.drop(self.number)


class SharedVariants:
    """A `VariantBinder`.

    Args:
        model: of rank 0, with its `divisions`.
        ranks: the others.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self._model = model
        self._ranks = ranks
        self._size = ranks.group.size

    @property
    def binds_in_host_memory(self) -> bool:
        """See `VariantBinder.binds_in_host_memory`."""
        return bool(self._model.binds_in_host_memory)

    def base_weight(self, module: str) -> Tensor:
        """See `VariantBinder.base_weight`."""
        own: Tensor = self._model.base_weight(module)
        division = self._division(module)
        return own if division is None else self._join(module, "weight", own, division)

    def base_bias(self, module: str) -> Tensor:
        """See `VariantBinder.base_bias`."""
        own: Tensor = self._model.base_bias(module)
        division = self._division(module)
        return own if division is None or division.by_inputs else self._join(module, "bias", own, division)

    def bind(self, terms: VariantTerms) -> SharedVariant:
        """See `VariantBinder.bind`."""
        mine, *others = (
            divide_variant(terms, self._model.divisions, Share(rank, self._size)) for rank in range(self._size)
        )
        own: BoundVariant = self._model.bind(mine)
        number, num_bytes = self._ranks.bind(others)
        total = sum if self.binds_in_host_memory else max
        return SharedVariant(own, number, total([own.num_bytes, *num_bytes]), self._ranks.drop)

    def _division(self, module: str) -> Division | None:
        """Of a module, or of a parameter that holds all experts, also where one of them is asked for."""
        parameter, _, last = module.rpartition(".")
        found: Division | None = self._model.divisions.get(parameter if last.isdigit() else module)
        return found

    def _join(self, module: str, kind: Literal["weight", "bias"], own: Tensor, division: Division) -> Tensor:
        """What the ranks have of a weight or bias, put together."""
        axis = 1 if division.by_inputs else 0
        shape = list(own.shape)
        shape[axis] = sum(part.size for part in division.parts)
        whole = torch.empty(shape, dtype=own.dtype, device=own.device)
        for rank, share in enumerate([own, *self._ranks.weights(module, kind)]):
            assert share is not None, f"rank {rank} lacks {module}.{kind}"
            start = 0
            for first, end in division.ranges(Share(rank, self._size)):
                whole.narrow(axis, first, end - first).copy_(share.narrow(axis, start, end - first))
                start += end - first
        return whole
