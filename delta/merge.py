"""Apply a delta to its base on disk: the fine-tune as an ordinary checkpoint directory again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from compression.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter
from delta.apply import DeltaStack
from delta.artifact import EXTRA_FILES, Delta, open_delta
from delta.checkpoint_tensors import open_checkpoint
from delta.tensor_digest import tensor_digest
from registry.companion_files import companion_files
from registry.digest import combine_tensor_digests
from registry.errors import CheckpointError
from registry.staged_directory import staged_directory


def merge_delta(
    base: Path, delta: Path, out: Path, *, report: Callable[[str], None], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write base + delta to the new directory `out`, in the dtypes and with the files of the fine-tune.

    Reads one tensor at a time. The result's digest is compared with the fine-tune's before it appears under `out`.

    Raises:
        CheckpointError: another base than the delta's, a damaged file, or an `out` that exists.
        UnsupportedModelError: a base that is not safetensors.
        InternalError: the disk is full.
    """
    with open_checkpoint(base) as tensors, open_delta(delta) as opened, staged_directory(out) as staging:
        stack = DeltaStack([opened])
        digests: dict[str, str] = {}
        names = tensors.names()
        report(f"adding {len(opened.config.tensors)} changed tensors to {len(names)}")
        with SafetensorsWriter(staging, names, max_shard_bytes=max_shard_bytes) as writer:
            for name in names:
                weight = stack.apply(name, tensors.read(name))
                digests[name] = tensor_digest(weight)
                writer.add(name, weight)
            stack.check_complete()
        if combine_tensor_digests(digests) != opened.config.target_digest:
            raise CheckpointError(f"{delta} is damaged: it does not give its fine-tune back; copy the delta again")
        _write_files(companion_files(base), opened, staging)
    report(f"wrote {out}")


def _write_files(base_files: dict[str, Path], delta: Delta, staging: Path) -> None:
    for name, digest in delta.config.files.items():
        stored = delta.path / EXTRA_FILES / name
        source = stored if stored.is_file() else base_files.get(name)
        if source is None or hashlib.sha256(source.read_bytes()).hexdigest() != digest:
            where = "the delta's copy is damaged" if source is stored else "the base's file is missing or was changed"
            raise CheckpointError(f"{name} is not the file that {delta.path} was made with: {where}")
        shutil.copyfile(source, staging / name)
