"""Where a tool may write."""

from __future__ import annotations

from pathlib import Path

from registry.errors import InvalidRequestError


def check_apart(out: Path, *inputs: Path) -> None:
    """Raises InvalidRequestError: writing `out` would touch an input."""
    ours = out.resolve()
    for path in inputs:
        theirs = path.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise InvalidRequestError(f"{out} and {path} are one directory, or one is in the other; give another --out")
