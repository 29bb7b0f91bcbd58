"""A directory that a fine-tune is loaded from when deltas are added at load: its files, and its base's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from delta.delta_config import CONFIG_FILE
from delta.fine_tune_files import write_small_files
from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError
from registry.staged_directory import staged_directory


def applied_model(base: Path, deltas: Sequence[Path], cache_dir: Path) -> Path:
    """The directory of the fine-tune that the last delta leads to, made the first time; without deltas the base's own.

    It holds links to the base's weights, to which the deltas are still to be added, and the fine-tune's config,
    tokenizer and chat template.

    Raises:
        CheckpointError: base or delta cannot be read, or they do not belong together.
    """
    if not deltas:
        return base
    for delta in deltas:
        if not (delta / CONFIG_FILE).is_file():
            raise CheckpointError(f"{delta} is no delta: it has no {CONFIG_FILE}; check --apply-delta")
    weights = read_checkpoint(base).files
    identity = hashlib.sha256((deltas[-1] / CONFIG_FILE).read_bytes())
    for file in weights:
        status = file.stat()
        identity.update(f"\n{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    target = cache_dir / "applied" / identity.hexdigest()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged_directory(target) as staging:
            write_small_files(base, deltas[-1], staging)
            for file in (*weights, *base.glob("*.safetensors.index.json")):
                (staging / file.name).symlink_to(file.resolve())
    except CheckpointError:
        if not target.is_dir():  # it is there when another worker was quicker
            raise
    return target
