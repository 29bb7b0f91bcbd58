"""Apply a delta to its base on disk: the fine-tune as an ordinary checkpoint directory again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from compression.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter
from delta.artifact import EXTRA_FILES, Delta, open_delta
from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.output_path import check_apart
from delta.reconstruct import reconstruct
from delta.scratch import Scratch
from delta.tensor_digest import tensor_digest
from registry.companion_files import companion_files
from registry.digest import Progress
from registry.errors import CheckpointError
from registry.staged_directory import staged_directory


def apply_delta(
    base: Path,
    delta: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write base + delta to the directory `out`, in the dtypes and with the files of the fine-tune.

    Reads one tensor at a time. Every tensor is compared with the digest of what the delta gives back.

    Args:
        dtype: of all floating-point weights that are written; None: the fine-tune's own.
        force: replace a model's directory that is there; it stays until the new one is complete.
        progress: called with the bytes that are done, and all.

    Raises:
        InvalidRequestError: `out` is an input.
        CheckpointError: another base than the delta's, a damaged file, or an `out` that exists.
        UnsupportedModelError: a base that is not safetensors.
        InternalError: the disk is full.
    """
    check_apart(out, base, delta)
    with (
        open_checkpoint(base) as ours,
        open_delta(delta) as opened,
        staged_directory(out, replaces=("config.json",) if force else ()) as staging,
    ):
        names = [*ours.names(), *opened.config.tensors, *opened.config.tied]
        with SafetensorsWriter(staging, names, max_shard_bytes=max_shard_bytes) as writer:
            for name, weight in given_back(ours, opened, progress, keep=False):
                writer.add(name, weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight)
        for name, content in small_files(companion_files(base), opened).items():
            (staging / name).write_bytes(content)


def given_back(
    base: CheckpointTensors, delta: Delta, progress: Progress | None = None, *, keep: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that the delta gives back, checked against its digest, in the order of the base's files.

    Args:
        keep: each is in memory of its own; otherwise the next one may overwrite it.

    Raises:
        CheckpointError: another base than the delta's, or a damaged file.
    """
    config = delta.config
    check_base_names(base, delta)
    expected = config.result_tensors()
    by_base: dict[str | None, list[str]] = {}
    for name, entry in config.tensors.items():
        by_base.setdefault(entry.base, []).append(name)
    copies: dict[str, list[str]] = {}
    for name, other in config.tied.items():
        copies.setdefault(other, []).append(name)
    done = 0
    of_base, of_sum = (None, None) if keep else (Scratch(), Scratch())
    for base_name in (*base.names(), None):
        before = None if base_name is None else read_base(base, base_name, delta, of_base)
        names = by_base.get(base_name, [])
        if base_name is not None and base_name not in names and base_name not in config.dropped:
            names = [base_name, *names]
        for name in names:
            weight = (
                before if name == base_name and name not in config.tensors else _weight(before, name, delta, of_sum)
            )
            assert weight is not None
            if tensor_digest(weight) != expected[name]:
                raise CheckpointError(f"{delta.path} does not give back the {name!r} that it promises; copy it again")
            for each in (name, *copies.get(name, ())):
                yield each, weight
        if progress is not None and before is not None:
            done += before.nbytes
            progress(done, base.num_bytes)


def small_files(base_files: Mapping[str, Path], delta: Delta) -> dict[str, bytes]:
    """The fine-tune's config, tokenizer and template files by name.

    Raises:
        CheckpointError: one is missing or is not the one that the delta was made with.
    """
    found = {}
    for name, digest in delta.config.files.items():
        stored = delta.path / EXTRA_FILES / name
        source = stored if stored.is_file() else base_files.get(name)
        content = None if source is None else source.read_bytes()
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            where = "the delta's copy is damaged" if source is stored else "the base's file is missing or was changed"
            raise CheckpointError(f"{name} is not the file that {delta.path} was made with: {where}")
        found[name] = content
    return found


def check_base_names(base: CheckpointTensors, delta: Delta) -> None:
    ours, theirs = set(base.names()), delta.config.base.tensors.keys()
    if ours != theirs:
        raise CheckpointError(
            f"{delta.path} was made from another base model, {delta.config.base.name}: tensors that only one of both "
            f"has are {', '.join(sorted(ours ^ theirs)[:3])}. Use the base that it was made from"
        )


def read_base(base: CheckpointTensors, name: str, delta: Delta, scratch: Scratch | None = None) -> torch.Tensor:
    tensor = base.read(name, scratch)
    if tensor_digest(tensor) != delta.config.base.tensors[name]:
        raise CheckpointError(
            f"{delta.path} was made from another base model, {delta.config.base.name} "
            f"({delta.config.base.digest[:19]}…): this one differs in {name!r}. Use the base that it was made from"
        )
    return tensor


def _weight(before: torch.Tensor | None, name: str, delta: Delta, scratch: Scratch | None) -> torch.Tensor:
    entry = delta.config.tensors[name]
    try:
        return reconstruct(before, delta.read_terms(name), entry.torch_dtype, entry.shape, scratch)
    except ValueError as error:
        raise CheckpointError(f"{delta.path}: {name!r}: {error}; make the delta again") from error
