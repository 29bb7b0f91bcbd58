"""Base digests that were computed before, so that a worker does not read its whole checkpoint twice at each start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from registry.atomic_file import write_file
from registry.checkpoint import Checkpoint
from registry.digest import base_digest


def cached_base_digest(checkpoint: Checkpoint, cache_dir: Path) -> str:
    """`base_digest` of a checkpoint, remembered under `cache_dir` for files of the same path, size and change time.

    Raises:
        CheckpointError: a file became unreadable since its header was read.
        InternalError: the cache cannot be written.
    """
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
    key = hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()
    remembered = cache_dir / "digests" / key
    if remembered.is_file():
        return remembered.read_text()
    digest = base_digest(checkpoint)
    write_file(remembered, digest.encode())
    return digest
