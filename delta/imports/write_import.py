"""Write a delta whose terms are known already, instead of being made from two models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.codecs.codec import Term
from delta.codecs.policy import CodecPolicy
from delta.delta_config import CONFIG_FILE, DeltaConfig, DeltaTarget, Lineage
from delta.encode_tensor import describe_tensor, encode_tensor
from delta.make import Labels, made_with, store_files
from delta.make_journal import JournalEntry, MakeJournal
from delta.output_path import check_apart
from delta.reconstruct import reconstruct
from delta.tensor_digest import tensor_digest
from registry.companion_files import companion_files
from registry.digest import Progress, combine_tensor_digests
from registry.errors import CheckpointError, InvalidRequestError
from registry.staged_directory import resumable_directory


class Changes(Protocol):
    """What an imported fine-tune changes in its base."""

    @property
    def source(self) -> str:
        """What it is, for people: "BitDelta diff.pt"."""
        ...

    def change(self, name: str, before: Tensor) -> tuple[Term, ...] | Tensor | None:
        """Terms that are added to the base's tensor, or the fine-tune's own tensor; None: it is the base's.

        Raises:
            CheckpointError: what is stored does not fit the tensor.
        """
        ...

    def check_all_used(self) -> None:
        """Raises CheckpointError: something was not asked for, because the base has no such tensor."""
        ...


def write_import(
    base: Path,
    changes: Changes,
    out: Path,
    policy: CodecPolicy,
    *,
    files_from: Path | None,
    labels: Labels,
    force: bool = False,
    progress: Progress | None = None,
) -> DeltaConfig:
    """Write the delta of `changes` to the directory `out`. Holds one tensor at a time, and what `changes` holds.

    Args:
        policy: of matrices that are given whole.
        files_from: the directory with the fine-tune's config and tokenizer; None: those of the base.
        force: replace a delta that is there; it stays until the new one is complete.
        progress: called with the bytes of the base that are done, and all.

    Raises:
        InvalidRequestError: nothing is changed.
        CheckpointError: another base than the fine-tune's, a file that cannot be read, or `out` exists.
        InternalError: the disk is full.
    """
    check_apart(out, base)
    with (
        open_checkpoint(base) as tensors,
        resumable_directory(out, replaces=(CONFIG_FILE,) if force else ()) as directory,
    ):
        # No inputs that another run could have in common: imports are fast and start from the beginning.
        with MakeJournal(directory.scratch, {"import": str(directory.scratch.stat().st_ctime_ns)}) as journal:
            _write_all(tensors, changes, policy, journal, progress)
            changes.check_all_used()
            sources = companion_files(base if files_from is None else files_from)
            files = store_files(companion_files(base), sources, directory.result)
            config = _describe(base, changes.source, journal, files, labels)
            if not config.tensors:
                raise InvalidRequestError(f"the {changes.source} changes nothing; there is nothing to store")
            journal.write_tensors(directory.result)
        (directory.result / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    return config


def _write_all(
    tensors: CheckpointTensors,
    changes: Changes,
    policy: CodecPolicy,
    journal: MakeJournal,
    progress: Progress | None,
) -> None:
    done = 0
    for name in tensors.names():
        before = tensors.read(name)
        done += before.nbytes
        digest = tensor_digest(before)
        change = changes.change(name, before)
        if change is None or (isinstance(change, Tensor) and tensor_digest(change) == digest):
            journal.add(JournalEntry(name, digest, digest, None), ())
        elif isinstance(change, Tensor):
            after_digest = tensor_digest(change)
            terms, tensor = encode_tensor(before, change, policy, base_name=name, target_digest=after_digest)
            journal.add(JournalEntry(name, digest, after_digest, tensor), terms)
        else:
            result = reconstruct(before, change, before.dtype, tuple(before.shape))
            after_digest = tensor_digest(result)
            tensor = describe_tensor(change, result, base_name=name, digest=after_digest, error=0.0)
            journal.add(JournalEntry(name, digest, after_digest, tensor), change)
        if progress is not None:
            progress(done, tensors.num_bytes)


def _describe(base: Path, source: str, journal: MakeJournal, files: Mapping[str, str], labels: Labels) -> DeltaConfig:
    entries = journal.entries.values()
    base_digests = {entry.name: entry.base_digest for entry in entries if entry.base_digest is not None}
    tensors = {entry.name: entry.tensor for entry in entries if entry.tensor is not None}
    result = base_digests | {name: tensor.digest for name, tensor in tensors.items()}
    return DeltaConfig(
        base=labels.describe_base(base, base_digests),
        target=DeltaTarget(
            name=labels.target_name or source,
            digest=combine_tensor_digests({entry.name: entry.target_digest for entry in entries}),
        ),
        result_digest=combine_tensor_digests(result),
        tensors=tensors,
        tied={},
        dropped={},
        files=files,
        lineage=Lineage(made_with(), source, labels.parents),
        license=labels.license,
    )


def check_shape(source: str, name: str, found: Tensor, expected: tuple[int, ...]) -> Tensor:
    """Raises CheckpointError: a tensor of another shape."""
    if tuple(found.shape) != expected:
        raise CheckpointError(
            f"{source}: {name!r} is {list(found.shape)}, but the base calls for {list(expected)}; is it its base?"
        )
    return found
