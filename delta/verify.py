"""Check that a delta is whole, and that a base is the one that it was made from."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Literal, TypeAlias

from delta.apply import check_base_names, given_back, read_base, small_files
from delta.artifact import EXTRA_FILES, Delta, open_delta
from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.delta_config import read_delta_config
from registry.checkpoint import read_checkpoint
from registry.companion_files import companion_files
from registry.digest import Progress, base_digest
from registry.errors import CheckpointError

Level: TypeAlias = Literal["header", "sampled", "full"]
"""header: descriptions, names, shapes and sizes; sampled: also the data of some tensors; full: all data, and with a
base every tensor that is given back."""

NUM_SAMPLES = 8


def verify_delta(
    delta: Path, base: Path | None = None, *, level: Level = "full", progress: Progress | None = None
) -> None:
    """Return if nothing is wrong.

    Raises:
        CheckpointError: the delta is damaged, or was made from another base.
        UnsupportedModelError: a base that is not safetensors.
    """
    with open_delta(delta) as opened:
        _check_files(opened)
        if base is None:
            _read_terms(opened, level, progress)
            return
        with open_checkpoint(base) as tensors:
            check_base_names(tensors, opened)
            small_files(companion_files(base), opened)
            if level == "full":
                for _ in given_back(tensors, opened, progress, keep=False):
                    pass
                return
            _read_terms(opened, level, progress)
            if level == "sampled":
                _sample_base(tensors, opened)


def check_target(delta: Path, target: Path, *, progress: Progress | None = None) -> None:
    """Return if the delta was made of the fine-tune `target` as it is now; reads all of it.

    Raises:
        CheckpointError: it was made of another one, whose tensors or small files differ, or a file cannot be read.
    """
    config = read_delta_config(delta)
    files = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in companion_files(target).items()}
    if files != config.files or base_digest(read_checkpoint(target), progress) != config.target.digest:
        raise CheckpointError(
            f"{delta} was not made of {target} as it is now; remove it or give another name, to make the delta anew"
        )


def _read_terms(delta: Delta, level: Level, progress: Progress | None) -> None:
    names = list(delta.config.tensors)
    if level == "header":
        return
    chosen = _sample(names) if level == "sampled" else names
    for count, name in enumerate(chosen, 1):
        delta.read_terms(name)
        if progress is not None:
            progress(count, len(chosen))


def _sample_base(base: CheckpointTensors, delta: Delta) -> None:
    for name in _sample(base.names()):
        read_base(base, name, delta)


def _sample(names: list[str]) -> list[str]:
    """Other ones each time, so that what one check does not see another may."""
    return random.sample(names, min(NUM_SAMPLES, len(names)))


def _check_files(delta: Delta) -> None:
    """Files of the artifact itself."""
    directory = delta.path / EXTRA_FILES
    found = {file.name: file for file in directory.iterdir()} if directory.is_dir() else {}
    for name, file in found.items():
        if name not in delta.config.files or not file.is_file():
            raise CheckpointError(f"{file} does not belong to the delta; copy the delta again")
        if hashlib.sha256(file.read_bytes()).hexdigest() != delta.config.files[name]:
            raise CheckpointError(f"{file} is damaged; copy the delta again")
