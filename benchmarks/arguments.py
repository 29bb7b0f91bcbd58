"""What several benchmarks take on the command line, each the `type` of an argument."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive_int(text: str) -> int:
    """At least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def new_file(text: str) -> Path:
    """A file that can be written at the end of a long run: its directory is there."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    return path
