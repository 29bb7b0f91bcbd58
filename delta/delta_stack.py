"""Add deltas to the weights of their base while a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from delta.artifact import Delta
from delta.delta_config import DeltaTensor
from delta.reconstruct import add_difference, reconstruct
from delta.tensor_digest import tensor_digest
from registry.errors import CheckpointError, UnsupportedModelError


class DeltaStack:
    """One or more deltas of one base, added while its weights stream by.

    Every tensor of the base is compared with the digest in the delta, so that a delta never runs on another base.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        """Raises UnsupportedModelError: a delta gives back tensors that the base, as configured, has no place for."""
        self._deltas = tuple(deltas)
        self._seen: set[str] = set()
        for delta in deltas:
            _check_fits(delta)

    def apply(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The weight `name` with all deltas added: cast(fp32(W) + Σ D), rounded once to the dtype of the last delta.

        One delta gives back exactly what it stands for; of several, one that stores W' itself adds fp32(W') - fp32(W).

        Raises:
            CheckpointError: the base is not the one that a delta was made from, or a delta is damaged.
            UnsupportedModelError: several deltas change a tensor of integers.
        """
        self._seen.add(name)
        self._check_base(name, base)
        # A tensor that the fine-tune does not have is a copy of another one of the base, and stays one.
        changing = [
            (delta, changed, delta.config.tensors[changed])
            for delta in self._deltas
            if (changed := delta.config.dropped.get(name, name)) in delta.config.tensors
        ]
        if not changing:
            return base
        try:
            if len(changing) == 1:
                ((delta, changed, entry),) = changing
                return reconstruct(base, delta.read_terms(changed), entry.torch_dtype, entry.shape)
            return _sum(name, base, changing)
        except ValueError as error:
            paths = " or ".join(str(delta.path) for delta, _, _ in changing)
            raise CheckpointError(f"{paths}: {name!r}: {error}; make the delta again") from error

    def _check_base(self, name: str, base: torch.Tensor) -> None:
        digest = tensor_digest(base)
        for delta in self._deltas:
            expected = delta.config.base.tensors.get(name)
            if expected != digest:
                what = "has besides" if expected is None else "differs in"
                raise CheckpointError(
                    f"{delta.path} was made from another base model, {delta.config.base.name} "
                    f"({delta.config.base.digest[:19]}…): this one {what} {name!r}. Use the base that it was made from"
                )

    def check_complete(self) -> None:
        """Raises CheckpointError if the base lacked a tensor that a delta's base has."""
        for delta in self._deltas:
            missing = sorted(delta.config.base.tensors.keys() - self._seen)
            if missing:
                raise CheckpointError(
                    f"{delta.path} belongs to another base model: {len(missing)} of its tensors are not in this one "
                    f"({', '.join(missing[:3])})"
                )


def _sum(name: str, base: torch.Tensor, changing: Sequence[tuple[Delta, str, DeltaTensor]]) -> torch.Tensor:
    if not base.is_floating_point():
        raise UnsupportedModelError(f"several deltas change {name!r}, a tensor of integers; use one of them")
    weight = base.to(torch.float32, copy=True)
    for delta, changed, entry in changing:
        add_difference(weight, base, delta.read_terms(changed), entry.torch_dtype)
    return weight.to(changing[-1][2].torch_dtype)


def _check_fits(delta: Delta) -> None:
    if names := delta.config.misfits:
        raise UnsupportedModelError(
            f"{delta.path} gives back {', '.join(names[:3])}, which the base does not have or only with fewer rows; "
            f"write it out and serve that: python -m delta apply --base BASE --delta {delta.path} --out DIRECTORY"
        )
