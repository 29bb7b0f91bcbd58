r"""The identity of a base model: a digest of its tensors, whatever the sharding and the order of the files.

    tensor digest  t_i = SHA-256(JSON [dtype, shape] ‖ "\n" ‖ bytes)
    base digest        = SHA-256("rootgraft base 1\n" ‖ JSON of the list [[name, t_i], …] sorted by name)
    header digest      = SHA-256("rootgraft header 1\n" ‖ JSON of the list [[name, dtype, shape], …] sorted by name)

JSON is written without spaces and in ASCII. dtype and shape are those of `TensorHeader`, bytes those in the file, so a
GGUF file and the safetensors that it was converted from are two bases: their values differ too.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from registry.checkpoint import Checkpoint
from registry.errors import CheckpointError
from registry.tensor_header import TensorHeader

Progress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""

_CHUNK_BYTES = 4 << 20
_MAX_THREADS = 16


def header_digest(checkpoint: Checkpoint) -> str:
    """The digest ("sha256:…") of names, dtypes and shapes: instant, and enough to notice a converted base.

    Raises:
        CheckpointError: a `.bin` checkpoint has no header.
    """
    if checkpoint.format == "bin":
        raise CheckpointError(f"{checkpoint.path} has no header to digest; convert it to safetensors")
    entries = sorted([tensor.name, tensor.dtype, tensor.shape] for tensor in checkpoint.tensors.values())
    return _digest_of(b"rootgraft header 1\n", entries)


def base_digest(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """The digest ("sha256:…") of all tensors, each read once in small pieces; several threads have a tensor each.

    A `.bin` checkpoint cannot be taken apart without unpickling it; its digest is that of its files' sorted digests
    under a prefix of its own, so it does depend on the sharding.

    Raises:
        CheckpointError: a file became unreadable or shorter since its header was read.
    """
    if checkpoint.format == "bin":
        return _bin_digest(checkpoint, progress)
    tensors = _in_order(checkpoint)
    counter = _Counter(sum(tensor.num_bytes for tensor in tensors), progress)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "digest") as pool:
        digests = list(pool.map(partial(_tensor_digest, counter), tensors))
    return combine_tensor_digests({tensor.name: digest for tensor, digest in zip(tensors, digests, strict=True)})


class _Counter:
    """Reports the bytes of all threads together."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _tensor_digest(counter: _Counter, tensor: TensorHeader) -> str:
    hasher = tensor_hasher(tensor.dtype, tensor.shape)
    with _open(tensor.file) as file:
        file.seek(tensor.offset_bytes)
        for num_bytes in _hash_range(hasher, file, tensor):
            counter.add(num_bytes)
    return hasher.hexdigest()


def tensor_hasher(dtype: str, shape: tuple[int, ...]) -> hashlib._Hash:
    """A hasher that becomes one tensor's digest when it is fed the tensor's bytes."""
    return hashlib.sha256(_canonical([dtype, shape]) + b"\n")


def combine_tensor_digests(digests: Mapping[str, str]) -> str:
    """The base digest ("sha256:…") of tensors whose digests, 64 hex digits each, are given by name."""
    return _digest_of(b"rootgraft base 1\n", sorted(digests.items()))


def _bin_digest(checkpoint: Checkpoint, progress: Progress | None) -> str:
    total = sum(path.stat().st_size for path in checkpoint.files)
    done = 0
    digests = []
    for path in checkpoint.files:
        hasher = hashlib.sha256()
        with _open(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        digests.append(hasher.hexdigest())
    return _digest_of(b"rootgraft bin 1\n", sorted(digests))


def _hash_range(hasher: hashlib._Hash, file: BinaryIO, tensor: TensorHeader) -> Iterator[int]:
    """Feed the tensor's bytes to `hasher`; yields the size of each chunk."""
    remaining = tensor.num_bytes
    while remaining:
        chunk = file.read(min(_CHUNK_BYTES, remaining))
        if not chunk:
            raise CheckpointError(
                f"{tensor.file} became shorter while tensor {tensor.name!r} was read; download it again"
            )
        hasher.update(chunk)
        remaining -= len(chunk)
        yield len(chunk)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _in_order(checkpoint: Checkpoint) -> list[TensorHeader]:
    """File by file in the order of their data, so that a disk is read nearly straight through."""
    places = {path: place for place, path in enumerate(checkpoint.files)}
    return sorted(checkpoint.tensors.values(), key=lambda tensor: (places[tensor.file], tensor.offset_bytes))


def _digest_of(prefix: bytes, value: list[Any]) -> str:
    return f"sha256:{hashlib.sha256(prefix + _canonical(value)).hexdigest()}"


def _canonical(value: list[Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode("ascii")
