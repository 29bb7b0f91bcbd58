"""The small files beside a checkpoint's weights: config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
_WEIGHT_INDEX = ".index.json"


def companion_files(directory: Path) -> dict[str, Path]:
    """Regular files of `directory` that belong to the model and are neither weights nor their index, by name."""
    return {
        file.name: file
        for file in sorted(directory.iterdir())
        if file.is_file() and file.suffix in _SUFFIXES and not file.name.endswith(_WEIGHT_INDEX)
    }
