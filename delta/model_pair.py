"""Which tensor of a fine-tune belongs to which of its base.

Mostly the one of the same name. Besides there are tied weights that one of the two models stores twice, heads that were
untied, and vocabularies of different sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta.checkpoint_tensors import CheckpointTensors
from delta.same_bits import same_bits
from registry.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ModelPair:
    """Attributes:
    bases: tensors of the fine-tune, in the order of its files, and the base's tensor that each is compared with;
        None: there is none.
    tied: tensors of the fine-tune that the base does not have, and the one of the fine-tune that each is a copy of.
    dropped: tensors of the base that the fine-tune does not have, and the one of the base that each is a copy of.
    """

    bases: Mapping[str, str | None]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]


def pair_tensors(base: CheckpointTensors, target: CheckpointTensors) -> ModelPair:
    """Compare the headers of both models, and the data of tensors that only one of them has.

    Raises:
        CheckpointError: these are no base and fine-tune: a tensor is missing, or the shapes do not fit.
    """
    ours, theirs = base.checkpoint.tensors, target.checkpoint.tensors
    only_target = [name for name in target.names() if name not in ours]
    dropped: dict[str, str] = {}
    missing = []
    for name in ours.keys() - theirs.keys():
        twin = _twin(name, base, [other for other in ours if other in theirs])
        if twin is None:
            missing.append(name)
        else:
            dropped[name] = twin
    if missing:
        raise CheckpointError(
            f"only the base has {len(missing)} tensors ({', '.join(sorted(missing)[:3])}): these are no base and "
            "fine-tune, or the fine-tune was saved with tied weights and the base has others"
        )
    if len(only_target) == len(theirs):
        raise CheckpointError(
            f"{base.checkpoint.path} and {target.checkpoint.path} have no tensor of the same name; these are no base "
            "and fine-tune"
        )
    tied = {
        name: twin
        for name in only_target
        if (twin := _twin(name, target, [other for other in theirs if other in ours])) is not None
    }
    bases: dict[str, str | None] = {}
    for name in target.names():
        if name not in tied:
            bases[name] = name if name in ours else _embedding(base, theirs[name].shape)
            _check_shapes(name, ours[name].shape if name in ours else None, theirs[name].shape)
    return ModelPair(bases, tied, dropped)


def _twin(name: str, model: CheckpointTensors, others: list[str]) -> str | None:
    """One of the others with the same bits; only matrices are tied."""
    header = model.checkpoint.tensors[name]
    alike = [
        other
        for other in others
        if model.checkpoint.tensors[other].shape == header.shape
        and model.checkpoint.tensors[other].dtype == header.dtype
    ]
    if len(header.shape) != 2 or not alike:
        return None
    tensor = model.read(name)
    return next((other for other in alike if same_bits(tensor, model.read(other))), None)


def _embedding(base: CheckpointTensors, shape: tuple[int, ...]) -> str | None:
    """The base's table that a head of this shape was untied from: the only one with a row for each token."""
    vocab_size = _vocab_size(base.checkpoint.path)
    tables = [
        name
        for name, header in base.checkpoint.tensors.items()
        if len(shape) == 2 and header.shape == (vocab_size, shape[1])
    ]
    return tables[0] if len(tables) == 1 else None


def _vocab_size(path: Path) -> int | None:
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error
    found = config.get("vocab_size") if isinstance(config, dict) else None
    return found if isinstance(found, int) else None


def _check_shapes(name: str, ours: tuple[int, ...] | None, theirs: tuple[int, ...]) -> None:
    if ours is None or ours == theirs or (len(ours) == len(theirs) == 1):
        return
    if len(ours) != 2 or len(theirs) != 2 or ours[1] != theirs[1]:
        raise CheckpointError(
            f"{name!r} is {list(ours)} in the base and {list(theirs)} in the fine-tune; only rows of a table may be "
            "more or fewer. Is this the fine-tune's base?"
        )
