"""Make a delta: what a full fine-tune changed in its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from delta.artifact import EXTRA_FILES
from delta.checkpoint_tensors import CheckpointTensors, open_checkpoint
from delta.codecs.codec import Term
from delta.codecs.policy import CodecPolicy
from delta.delta_config import (
    CONFIG_FILE,
    FORMAT_VERSION,
    DeltaBase,
    DeltaConfig,
    DeltaTarget,
    DeltaTensor,
    Lineage,
)
from delta.encode_tensor import encode_tensor
from delta.input_samples import InputSamples
from delta.make_journal import JournalEntry, MakeJournal, is_begun
from delta.model_pair import ModelPair, pair_tensors
from delta.output_path import check_apart
from delta.quality_record import Probe, Quality
from delta.scratch import Scratch
from delta.tensor_digest import tensor_digest
from registry.companion_files import companion_files
from registry.digest import Progress, combine_tensor_digests
from registry.errors import CheckpointError, InvalidRequestError
from registry.parameter_names import is_input_embedding
from registry.staged_directory import resumable_directory, scratch_directory

Judge: TypeAlias = Callable[[Path], tuple[Quality, Probe]]


@dataclass(frozen=True, slots=True)
class Labels:
    """What a person says about a delta.

    Attributes:
        base_name, base_revision, target_name: None: the directory's name; no revision.
        parents: digests of artifacts that it continues or replaces.
    """

    base_name: str | None = None
    base_revision: str | None = None
    target_name: str | None = None
    license: str | None = None
    parents: tuple[str, ...] = ()

    def describe_base(self, path: Path, tensors: Mapping[str, str]) -> DeltaBase:
        """Args:
        path: of its checkpoint.
        tensors: their digests, by name.
        """
        return DeltaBase(
            name=self.base_name or path.resolve().name,
            revision=self.base_revision,
            digest=combine_tensor_digests(tensors),
            tensors=tensors,
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the linear layers of the fine-tune get as inputs.

    Attributes:
        name: of what they were computed of; the same for the same inputs.
    """

    name: str
    inputs: InputSamples


def make_delta(
    base: Path,
    target: Path,
    out: Path,
    policy: CodecPolicy,
    *,
    labels: Labels,
    force: bool = False,
    calibration: Calibration | None = None,
    goal: object = None,
    judge: Judge | None = None,
    report: Callable[[str], None],
    progress: Progress | None = None,
) -> DeltaConfig:
    """Write the delta of the fine-tune `target` against `base` to the directory `out`.

    Holds two tensors at a time and what their encoding needs. If it is killed, the next call with the same inputs goes
    on where it was.

    Args:
        force: replace a delta that is there; it stays until the new one is complete.
        calibration: low-rank terms are made for these inputs; None: for any.
        goal: what `judge` asks for, as JSON.
        judge: called with the complete delta's directory; what it finds is recorded, and no delta appears if it raises.
        progress: called with the bytes of the fine-tune that are done, and all.

    Raises:
        InvalidRequestError: the two models are the same.
        CheckpointError: they are no base and fine-tune, one cannot be read or was written to, or `out` exists.
        UnsupportedModelError: a checkpoint that is not safetensors.
        InternalError: the disk is full.
    """
    check_apart(out, base, target)
    with (
        open_checkpoint(base) as ours,
        open_checkpoint(target) as theirs,
        resumable_directory(out, replaces=(CONFIG_FILE,) if force else ()) as directory,
    ):
        made_from = _made_from(ours, theirs, policy, calibration, goal)
        with MakeJournal(directory.scratch, made_from) as journal:
            if journal.entries:
                report(f"going on after {len(journal.entries)} tensors")
            pair = pair_tensors(ours, theirs)
            inputs: InputSamples = {} if calibration is None else calibration.inputs
            _encode_all(ours, theirs, pair, policy, inputs, journal, progress)
            files = store_files(companion_files(base), companion_files(target), directory.result)
            config = _describe(ours, theirs, pair, journal, files, labels)
            if (ours.states(), theirs.states()) != (made_from["base"], made_from["target"]):
                raise CheckpointError("a model was written to while it was read; make the delta again")
            if not config.tensors and not config.tied and not (directory.result / EXTRA_FILES).exists():
                raise InvalidRequestError(f"{target} does not differ from {base}; there is nothing to store")
            journal.write_tensors(directory.result)
        _write_config(config, directory.result)
        if judge is not None:
            quality, probe = judge(directory.result)
            config = replace(config, quality=quality, probe=probe)
            _write_config(config, directory.result)
    return config


def policy_reached(
    base: Path, target: Path, out: Path, policy: CodecPolicy, *, calibration: Calibration, goal: object
) -> CodecPolicy:
    """With which a make of these inputs was killed: `policy`, or with "auto" a finer one. `policy` if none was."""
    scratch = scratch_directory(out)
    with open_checkpoint(base) as ours, open_checkpoint(target) as theirs:
        tried: CodecPolicy | None = policy
        while tried is not None:
            if is_begun(scratch, _made_from(ours, theirs, tried, calibration, goal)):
                return tried
            tried = tried.finer() if policy.codec == "auto" else None
    return policy


def _made_from(
    base: CheckpointTensors,
    target: CheckpointTensors,
    policy: CodecPolicy,
    calibration: Calibration | None,
    goal: object,
) -> dict[str, Any]:
    """All that decides what is made, as JSON."""
    return {
        "made_with": [FORMAT_VERSION, made_with()],
        "base": base.states(),
        "target": target.states(),
        "policy": asdict(policy),
        "calibration": None if calibration is None else calibration.name,
        "goal": goal,
    }


def _encode_all(
    base: CheckpointTensors,
    target: CheckpointTensors,
    pair: ModelPair,
    policy: CodecPolicy,
    inputs: InputSamples,
    journal: MakeJournal,
    progress: Progress | None,
) -> None:
    done = 0
    of_target, of_base, of_encoding = Scratch(), Scratch(), Scratch()
    for name, base_name in pair.bases.items():
        if name not in journal.entries:
            after = target.read(name, of_target)
            before = None if base_name is None else base.read(base_name, of_base)
            base_digest = None if before is None else tensor_digest(before)
            target_digest = tensor_digest(after)
            tensor: DeltaTensor | None = None
            terms: tuple[Term, ...] = ()
            if base_digest != target_digest or name != base_name:
                terms, tensor = encode_tensor(
                    before,
                    after,
                    policy.of_tables() if is_input_embedding(name) else policy,
                    base_name=base_name,
                    target_digest=target_digest,
                    inputs=inputs.get(name, ()),
                    scratch=of_encoding,
                )
            digest_of_name = base_digest if name == base_name else None
            journal.add(JournalEntry(name, digest_of_name, target_digest, tensor), terms)
        done += target.checkpoint.tensors[name].num_bytes
        if progress is not None:
            progress(done, target.num_bytes)


def store_files(base: Mapping[str, Path], target: Mapping[str, Path], directory: Path) -> dict[str, str]:
    """Digests of all small files of the fine-tune; those that the base does not have alike are copied."""
    digests: dict[str, str] = {}
    for name, file in target.items():
        content = file.read_bytes()
        digests[name] = hashlib.sha256(content).hexdigest()
        if name in base and hashlib.sha256(base[name].read_bytes()).hexdigest() == digests[name]:
            continue
        (directory / EXTRA_FILES).mkdir(exist_ok=True)
        (directory / EXTRA_FILES / name).write_bytes(content)
    return digests


def _describe(
    base: CheckpointTensors,
    target: CheckpointTensors,
    pair: ModelPair,
    journal: MakeJournal,
    files: Mapping[str, str],
    labels: Labels,
) -> DeltaConfig:
    entries = [journal.entries[name] for name in pair.bases]
    base_digests = {entry.name: entry.base_digest for entry in entries if entry.base_digest is not None}
    base_digests |= {name: tensor_digest(base.read(name)) for name in pair.dropped}
    target_digests = {entry.name: entry.target_digest for entry in entries}
    tensors = {entry.name: entry.tensor for entry in entries if entry.tensor is not None}
    result = {entry.name: entry.target_digest if entry.tensor is None else entry.tensor.digest for entry in entries}
    return DeltaConfig(
        base=labels.describe_base(base.checkpoint.path, base_digests),
        target=DeltaTarget(
            name=labels.target_name or target.checkpoint.path.resolve().name,
            digest=combine_tensor_digests(_with_copies(target_digests, pair.tied)),
        ),
        result_digest=combine_tensor_digests(_with_copies(result, pair.tied)),
        tensors=tensors,
        tied=pair.tied,
        dropped=pair.dropped,
        files=files,
        lineage=Lineage(made_with(), "full fine-tune", labels.parents),
        license=labels.license,
    )


def _write_config(config: DeltaConfig, directory: Path) -> None:
    (directory / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def made_with() -> str:
    return f"rootgraft {version('rootgraft')}"


def _with_copies(digests: dict[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    return digests | {name: digests[other] for name, other in tied.items()}
