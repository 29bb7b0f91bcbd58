"""The file that a benchmark writes: when and how it was made, on what machine, and what was found."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import describe_machine


def now() -> str:
    """In UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_run(script: str, arguments: Sequence[str], started_at: str) -> dict[str, Any]:
    """How a report begins.

    Args:
        script: its name in this directory.
        started_at: see `now`.
    """
    command = shlex.join(["python", f"benchmarks/{script}", *arguments])
    return {"started_at": started_at, "command": command, "machine": describe_machine()}


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """As JSON; what was there is replaced."""
    path.write_text(json.dumps(report, indent=2) + "\n")
