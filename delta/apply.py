"""Add deltas to the weights of their base."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from delta.artifact import Delta
from delta.codec import add
from delta.tensor_digest import tensor_digest
from registry.errors import CheckpointError


class DeltaStack:
    """One or more deltas of one base, added while its weights stream by.

    Every tensor of the base is compared with the digest in the delta, so that a delta never runs on another base.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self._deltas = tuple(deltas)
        self._seen: set[str] = set()

    def apply(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The weight `name` with all deltas added: cast(fp32(W) + fp32(D1) + fp32(D2) + ...), exact for one delta.

        Raises:
            CheckpointError: the base is not the one that a delta was made from, or two deltas that cannot be added.
        """
        self._seen.add(name)
        self._check_base(name, base)
        changing = [delta for delta in self._deltas if name in delta.config.tensors]
        if not changing:
            return base
        if len(changing) > 1 and any(delta.config.tensors[name].codec == "replace" for delta in changing):
            paths = " and ".join(str(delta.path) for delta in changing)
            raise CheckpointError(f"{paths} both change {name!r} and one replaces it; they cannot be used together")
        weight = base
        for delta in changing:
            stored, entry = delta.read(name), delta.config.tensors[name]
            if stored.shape != base.shape:
                raise CheckpointError(f"{delta.path}: {name!r} is {list(stored.shape)}, the base's {list(base.shape)}")
            if entry.codec == "replace":
                return stored
            # Only the last sum is rounded to the fine-tune's dtype.
            weight = add(weight, stored, entry.torch_dtype if delta is changing[-1] else torch.float32)
        return weight

    def _check_base(self, name: str, base: torch.Tensor) -> None:
        digest = tensor_digest(base)
        for delta in self._deltas:
            expected = delta.config.base_tensors.get(name)
            if expected != digest:
                what = "has besides" if expected is None else "differs in"
                raise CheckpointError(
                    f"{delta.path} was made from another base model ({delta.config.base_digest[:19]}…): "
                    f"this one {what} {name!r}. Use the base that it was made from"
                )

    def check_complete(self) -> None:
        """Raises CheckpointError if the base lacked a tensor that a delta's base has."""
        for delta in self._deltas:
            missing = sorted(delta.config.base_tensors.keys() - self._seen)
            if missing:
                raise CheckpointError(
                    f"{delta.path} belongs to another base model: {len(missing)} of its tensors are not in this one "
                    f"({', '.join(missing[:3])})"
                )
