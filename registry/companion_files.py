"""The small files beside a checkpoint's weights: config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
_WEIGHT_INDEX = ".index.json"


def companion_files(directory: Path) -> dict[str, Path]:
    """Regular files of `directory` that belong to the model and are neither weights nor their index, by name."""
    return {file.name: file for file in sorted(directory.iterdir()) if file.is_file() and is_companion_file(file.name)}


def is_companion_file(name: str) -> bool:
    """Whether a file of this name is neither weights nor their index."""
    return Path(name).suffix in _SUFFIXES and not name.endswith(_WEIGHT_INDEX)
