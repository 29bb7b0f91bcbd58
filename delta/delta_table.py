"""What a delta holds, as a table for people and as JSON for programs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delta.delta_config import DeltaConfig, DeltaTensor, delta_digest
from delta.json_record import to_record


@dataclass(slots=True)
class _Group:
    """Tensors of one name but for the numbers in it, coded alike."""

    name: str
    codec: str
    tensors: list[DeltaTensor] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / max(1, sum(math.prod(tensor.shape) for tensor in self.tensors))

    @property
    def error(self) -> float:
        """The mean of the tensors'."""
        return sum(tensor.error for tensor in self.tensors) / len(self.tensors)


def delta_table(config: DeltaConfig) -> str:
    """A line for each group of tensors: codec, bits per weight, bytes, relative error; then the whole."""
    rows = [("tensors", "count", "codec", "bits/weight", "bytes", "error")]
    rows += [
        (
            group.name,
            str(len(group.tensors)),
            group.codec or "base's values",
            f"{group.bits_per_weight:.3f}",
            f"{group.num_bytes:,}",
            f"{group.error:.4f}",
        )
        for group in _groups(config)
    ]
    total = sum(tensor.num_bytes for tensor in config.tensors.values())
    lines = [*_aligned(rows), ""]
    lines.append(
        f"{len(config.tensors)} of {len(config.result_tensors())} tensors changed, {total:,} bytes; "
        + ("exact" if config.is_exact else "not exact")
    )
    lines.append(f"base {config.base.name} {config.base.digest}, fine-tune {config.target.name} {config.target.digest}")
    if (quality := config.quality) is not None:
        of_base = "unknown" if quality.base_kl_mean is None else f"{quality.base_kl_mean:.5f}"
        lines.append(
            f"KL {quality.kl_mean:.5f} nats a token (base {of_base}), top-1 {quality.top1:.1%} over "
            f"{quality.num_tokens} tokens of {quality.num_prompts} prompts ({quality.prompts}); of the fine-tune's own "
            f"answers {quality.answers:.1%} of {quality.num_answer_tokens} tokens"
        )
    if config.probe is not None:
        lines.append(f"probe of {len(config.probe.cases)} prompts")
    return "\n".join(lines)


def delta_summary(path: Path, config: DeltaConfig) -> dict[str, Any]:
    """For `inspect --json`: the identity, sizes by group and by tensor, quality and labels."""
    return {
        "digest": delta_digest(path),
        "base": {"name": config.base.name, "revision": config.base.revision, "digest": config.base.digest},
        "target": to_record(config.target),
        "result_digest": config.result_digest,
        "exact": config.is_exact,
        "num_tensors": len(config.result_tensors()),
        "num_bytes": sum(tensor.num_bytes for tensor in config.tensors.values()),
        "tensors": {
            name: {
                "codec": tensor.codec,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "num_bytes": tensor.num_bytes,
                "bits_per_weight": round(tensor.bits_per_weight, 4),
                "error": tensor.error,
            }
            for name, tensor in sorted(config.tensors.items())
        },
        "tied": to_record(config.tied),
        "dropped": to_record(config.dropped),
        "files": sorted(config.files),
        "lineage": to_record(config.lineage),
        "license": config.license,
        "quality": to_record(config.quality),
        "probe_cases": 0 if config.probe is None else len(config.probe.cases),
    }


def _groups(config: DeltaConfig) -> list[_Group]:
    groups: dict[tuple[str, str], _Group] = {}
    for name, tensor in config.tensors.items():
        pattern = re.sub(r"\.\d+(?=\.)", ".*", name)
        groups.setdefault((pattern, tensor.codec), _Group(pattern, tensor.codec)).tensors.append(tensor)
    return sorted(groups.values(), key=lambda group: (group.name, group.codec))


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = {1, 3, 4, 5}
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
