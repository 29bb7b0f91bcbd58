"""Tables of measured choices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

_TABLES = Path(__file__).with_name("tuned")


@dataclass(frozen=True, slots=True)
class TunedTable:
    """Of one device.

    Attributes:
        ops: by op, then by the op's own name of a class of shapes: its choices.
    """

    ops: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)

    def find(self, op: str, shape_class: str) -> Mapping[str, int] | None:
        """None: not measured."""
        return self.ops.get(op, {}).get(shape_class)


def table_name(device_name: str) -> str:
    """The file of a device: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json"


def read_table(device_name: str, folder: Path = _TABLES) -> TunedTable:
    """That of a device; an empty one where there is none."""
    path = folder / table_name(device_name)
    return TunedTable(json.loads(path.read_text())["ops"]) if path.is_file() else TunedTable()


def table_of(device: torch.device) -> TunedTable:
    """That of a device; an empty one for CPUs."""
    return read_table(torch.cuda.get_device_name(device)) if device.type == "cuda" else TunedTable()


def write_table(
    device_name: str, ops: Mapping[str, Mapping[str, Mapping[str, int]]], made_with: Mapping[str, str], folder: Path
) -> Path:
    """Write or extend the table of a device: what is measured anew takes the place of what is there."""
    path = folder / table_name(device_name)
    merged = {op: dict(choices) for op, choices in read_table(device_name, folder).ops.items()}
    for op, choices in ops.items():
        merged.setdefault(op, {}).update(choices)
    folder.mkdir(parents=True, exist_ok=True)
    table = {"device": device_name, "made_with": dict(made_with), "ops": merged}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return path
