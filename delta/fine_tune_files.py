"""The files of a fine-tune: which kind it is, and the small ones of a delta, its own in place of its base's."""

from __future__ import annotations

from pathlib import Path

from delta.apply import small_files
from delta.artifact import open_delta
from delta.delta_config import CONFIG_FILE
from registry.companion_files import companion_files


def is_delta(directory: Path) -> bool:
    """Rather than an adapter."""
    return (directory / CONFIG_FILE).is_file()


def write_small_files(base: Path, delta: Path, target: Path) -> None:
    """Write the fine-tune's config, tokenizer and template files into the directory `target`.

    Args:
        base: the base's directory.

    Raises:
        CheckpointError: the delta cannot be read, or one of the files is not the one that it was made with.
    """
    with open_delta(delta) as opened:
        for name, content in small_files(companion_files(base) if base.is_dir() else {}, opened).items():
            (target / name).write_bytes(content)
