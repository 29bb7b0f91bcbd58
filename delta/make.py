"""Make a delta: what a full fine-tune changed in its base, stored so that the fine-tune comes back bit for bit."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compression.safetensors_writer import SAFETENSORS_DTYPES, SafetensorsWriter
from delta.apply import DeltaStack
from delta.artifact import CONFIG_FILE, EXTRA_FILES, TENSORS_FILE, DeltaConfig, DeltaTensor, open_delta
from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.codec import encode
from delta.tensor_digest import tensor_digest
from registry.companion_files import companion_files
from registry.digest import combine_tensor_digests
from registry.errors import CheckpointError, InvalidRequestError
from registry.staged_directory import staged_directory

_REPORT_EVERY_BYTES = 1 << 30


@dataclass(slots=True)
class _Differences:
    """What one pass over both models found."""

    base_digests: dict[str, str] = field(default_factory=dict)
    target_digests: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, DeltaTensor] = field(default_factory=dict)


def make_delta(base: Path, target: Path, out: Path, *, report: Callable[[str], None]) -> DeltaConfig:
    """Write the delta of the fine-tune `target` against `base` to the new directory `out`.

    Reads two tensors at a time. The result is read back and compared with the fine-tune before it appears under `out`.

    Raises:
        InvalidRequestError: the two models are the same.
        CheckpointError: the two have different tensors, one cannot be read, or `out` exists.
        UnsupportedModelError: a checkpoint that is not safetensors.
        InternalError: the disk is full.
    """
    with (
        open_checkpoint(base) as base_tensors,
        open_checkpoint(target) as target_tensors,
        staged_directory(out) as staging,
    ):
        _check_same_tensors(base_tensors, target_tensors)
        found = _write_differences(base_tensors, target_tensors, staging, report)
        files = _store_files(companion_files(base), companion_files(target), staging)
        if not found.tensors and not (staging / EXTRA_FILES).exists():
            raise InvalidRequestError(f"{target} does not differ from {base}; there is nothing to store")
        config = DeltaConfig(
            base_digest=combine_tensor_digests(found.base_digests),
            target_digest=combine_tensor_digests(found.target_digests),
            base_tensors=found.base_digests,
            tensors=found.tensors,
            files=files,
        )
        (staging / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        report("verifying")
        _verify(staging, base_tensors, found)
    codecs = Counter(tensor.codec for tensor in config.tensors.values())
    shown = ", ".join(f"{count} {codec}" for codec, count in sorted(codecs.items())) or "none"
    report(f"wrote {out}: {len(config.tensors)} of {len(config.base_tensors)} tensors changed ({shown}), verified")
    return config


def _check_same_tensors(base: CheckpointTensors, target: CheckpointTensors) -> None:
    ours, theirs = base.checkpoint.tensors, target.checkpoint.tensors
    for owner, names in (("base", ours.keys() - theirs.keys()), ("fine-tune", theirs.keys() - ours.keys())):
        if names:
            raise CheckpointError(
                f"only the {owner} has {len(names)} tensors ({', '.join(sorted(names)[:3])}): these are no base and "
                "fine-tune, or one was saved with tied weights and the other without"
            )
    for name, header in ours.items():
        if theirs[name].shape != header.shape:
            raise CheckpointError(
                f"{name!r} is {list(header.shape)} in the base and {list(theirs[name].shape)} in the fine-tune; a "
                "delta needs equal shapes. Give the base the fine-tune's vocabulary size first"
            )


def _write_differences(
    base: CheckpointTensors, target: CheckpointTensors, staging: Path, report: Callable[[str], None]
) -> _Differences:
    found = _Differences()
    names = base.names()
    num_bytes = next_report = 0
    with SafetensorsWriter(staging, names, stem=Path(TENSORS_FILE).stem, max_shard_bytes=None) as writer:
        for count, name in enumerate(names, 1):
            before, after = base.read(name), target.read(name)
            found.base_digests[name] = tensor_digest(before)
            found.target_digests[name] = tensor_digest(after)
            if found.base_digests[name] != found.target_digests[name]:
                codec, stored = encode(before, after)
                found.tensors[name] = DeltaTensor(codec, SAFETENSORS_DTYPES[after.dtype], tensor_digest(stored))
                writer.add(name, stored)
            num_bytes += after.nbytes
            if num_bytes >= next_report or count == len(names):
                report(f"{count} of {len(names)} tensors compared, {len(found.tensors)} differ")
                next_report = num_bytes + _REPORT_EVERY_BYTES
    return found


def _store_files(base: Mapping[str, Path], target: Mapping[str, Path], staging: Path) -> dict[str, str]:
    """Digests of all small files of the fine-tune; those that the base does not have alike are copied."""
    digests: dict[str, str] = {}
    for name, file in target.items():
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        if name in base and hashlib.sha256(base[name].read_bytes()).hexdigest() == digests[name]:
            continue
        (staging / EXTRA_FILES).mkdir(exist_ok=True)
        shutil.copyfile(file, staging / EXTRA_FILES / name)
    return digests


def _verify(staging: Path, base: CheckpointTensors, found: _Differences) -> None:
    """Apply what was written to the base and compare every changed tensor with the fine-tune's digest."""
    with open_delta(staging) as delta:
        stack = DeltaStack([delta])
        for name in found.tensors:
            if tensor_digest(stack.apply(name, base.read(name))) != found.target_digests[name]:
                raise CheckpointError(
                    f"the delta does not give {name!r} back; were the models written to meanwhile? Make it again"
                )
