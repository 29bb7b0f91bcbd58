"""What loading a model did, summed up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from adapters.gguf_architectures import find_architecture
from adapters.load_plan import LoadPlan
from model_worker.engine.load_report import LoadReport, Outcome

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class FileSize:
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class OutcomeCount:
    """How many tensors ended so, and their bytes as they were read."""

    outcome: Outcome
    num_tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FusedWeights:
    """Weights of one kind that are made of several tensors each; layers and experts appear as `*`."""

    weight: str
    num_weights: int
    num_tensors: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors of one kind that are in no weight of the model, and why."""

    tensor: str
    num_tensors: int
    reason: str


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One load.

    Attributes:
        files: the weight files; several of them are shards.
        outcomes: of all tensors that were read.
        fused: weights that are made of several tensors.
        left_out: tensors that are in no weight.
        ties: pairs of a weight and the weight that it is.
        phases_s: seconds of each phase: build, read, fill, finish.
        resident_bytes: growth of the process's memory from before the load to after the first steps.
    """

    files: tuple[FileSize, ...]
    outcomes: tuple[OutcomeCount, ...]
    fused: tuple[FusedWeights, ...]
    left_out: tuple[LeftOut, ...]
    ties: tuple[tuple[str, str], ...]
    phases_s: dict[str, float]
    resident_bytes: int

    @property
    def file_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values())

    @property
    def bytes_per_s(self) -> float:
        """Of the files, over all phases."""
        return self.file_bytes / self.total_s


def summarize_load(plan: LoadPlan, report: LoadReport, *, resident_bytes: int) -> LoadSummary:
    """Sum up what the loader noted."""
    files = tuple(FileSize(file.name, file.stat().st_size) for file in plan.checkpoint.files)
    return LoadSummary(
        files=files,
        outcomes=tuple(_outcomes(report)),
        fused=_fused(report),
        left_out=_left_out(plan, report),
        ties=tuple(report.ties.items()),
        phases_s=dict(report.seconds),
        resident_bytes=resident_bytes,
    )


def _outcomes(report: LoadReport) -> Iterator[OutcomeCount]:
    for outcome in Outcome:
        sizes = [tensor.num_bytes for tensor in report.tensors if tensor.outcome is outcome]
        if sizes:
            yield OutcomeCount(outcome, len(sizes), sum(sizes))


def _fused(report: LoadReport) -> tuple[FusedWeights, ...]:
    weights: dict[str, list[str]] = {}
    for tensor in report.tensors:
        if tensor.outcome is Outcome.FUSED and tensor.weight is not None:
            weights.setdefault(_without_numbers(tensor.weight), []).append(tensor.weight)
    return tuple(FusedWeights(kind, len(set(names)), len(names)) for kind, names in weights.items())


def _left_out(plan: LoadPlan, report: LoadReport) -> tuple[LeftOut, ...]:
    reasons: dict[tuple[str, str], int] = {}

    def add(name: str, reason: str) -> None:
        key = (_without_numbers(name), reason)
        reasons[key] = reasons.get(key, 0) + 1

    for tensor in report.tensors:
        if tensor.outcome is Outcome.IGNORED:
            add(tensor.name, "computed from the config instead")
        elif tensor.outcome is Outcome.TIED:
            add(tensor.name, f"equal to {tensor.weight}, to which it is tied")
    if plan.checkpoint.format == "gguf":
        architecture = find_architecture(plan.checkpoint.metadata)
        for name in plan.checkpoint.tensors:
            if architecture.translate(name) is None:
                add(name, "repeats what the config says")
    return tuple(LeftOut(name, count, reason) for (name, reason), count in reasons.items())


def _without_numbers(name: str) -> str:
    return _NUMBER.sub("*", name)
