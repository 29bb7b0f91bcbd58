"""Reading the small files of a checkpoint with the checks that every format needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from registry.errors import CheckpointError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

MAX_JSON_BYTES = 100_000_000
"""No header, index or config is larger (the bound that the safetensors library also uses)."""


def file_size(path: Path) -> int:
    """Size of a checkpoint file in bytes; raises CheckpointError when it is absent, empty or a git-lfs pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; check the path or download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not size:
        raise CheckpointError(f"{path} is empty; download it again")
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path} is a git-lfs pointer, not the data; run `git lfs pull` in that repository")
    return size


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises CheckpointError for everything that is not one, duplicate keys included."""
    if file_size(path) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes, which no index or config is")
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """`data` as a JSON object; `where` names it in the CheckpointError."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{where} names {error.key!r} twice") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where} is not valid JSON ({reason}); the file is damaged, download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__} where an object belongs")
    return value


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result
