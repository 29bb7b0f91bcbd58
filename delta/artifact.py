"""The delta artifact: a directory with `delta_config.json` and `delta.safetensors` (docs/formats/delta.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compression.safetensors_writer import SAFETENSORS_DTYPES
from delta.codec import CODECS, Codec
from delta.tensor_digest import tensor_digest
from registry.errors import CheckpointError

FORMAT = "rootgraft-delta"
FORMAT_VERSION = 1
CONFIG_FILE = "delta_config.json"
TENSORS_FILE = "delta.safetensors"
EXTRA_FILES = "files"

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class DeltaTensor:
    """A tensor that the fine-tune changed.

    Attributes:
        codec: how the change is stored.
        dtype: of the weight in the fine-tune, in safetensors' spelling.
        digest: of the stored tensor, in hex.
    """

    codec: Codec
    dtype: str
    digest: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """delta_config.json.

    Attributes:
        base_digest, target_digest: "sha256:…" of all tensors of the base and of the fine-tune (registry.digest).
        base_tensors: name -> digest in hex of every tensor of the base, changed or not.
        tensors: the changed ones.
        files: name -> SHA-256 in hex of the fine-tune's small files that differ from the base's, kept under `files/`.
    """

    base_digest: str
    target_digest: str
    base_tensors: Mapping[str, str]
    tensors: Mapping[str, DeltaTensor]
    files: Mapping[str, str]

    def to_json(self) -> str:
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base": {"digest": self.base_digest, "tensors": dict(sorted(self.base_tensors.items()))},
            "target": {"digest": self.target_digest},
            "tensors": {name: asdict(tensor) for name, tensor in sorted(self.tensors.items())},
            "files": dict(sorted(self.files.items())),
        }
        return json.dumps(document, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Delta:
    """An opened delta artifact."""

    path: Path
    config: DeltaConfig
    _tensors: Any  # safetensors.safe_open, which has no public type

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor of a changed weight; raises CheckpointError if it is not the one that was written."""
        try:
            tensor: torch.Tensor = self._tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / TENSORS_FILE}: tensor {name!r} cannot be read ({error})") from error
        if tensor_digest(tensor) != self.config.tensors[name].digest:
            raise CheckpointError(f"{self.path / TENSORS_FILE}: tensor {name!r} is damaged; copy the delta again")
        return tensor


@contextmanager
def open_delta(path: Path) -> Iterator[Delta]:
    """Open a delta artifact and check that its two files belong together.

    Raises:
        CheckpointError: no delta, damaged, or of a format version or codec that this program does not know.
    """
    config = read_delta_config(path)
    try:
        opened = safe_open(path / TENSORS_FILE, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / TENSORS_FILE} cannot be read ({error}); copy the delta again") from error
    with opened as tensors:
        if set(tensors.keys()) != set(config.tensors):
            raise CheckpointError(
                f"{path}: {TENSORS_FILE} and {CONFIG_FILE} name different tensors; copy the delta again"
            )
        yield Delta(path, config, tensors)


def read_delta_config(path: Path) -> DeltaConfig:
    """Read and check delta_config.json of a delta directory."""
    file = path / CONFIG_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no delta: it has no {CONFIG_FILE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy the delta again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not the description of a delta (its format is not {FORMAT!r})")
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {document.get('format_version')!r}; this program reads version {FORMAT_VERSION}"
        )
    try:
        return _config_from_document(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__} {error}; copy the delta again") from error


def _config_from_document(document: dict[str, Any]) -> DeltaConfig:
    unknown = document.keys() - {"format", "format_version", "base", "target", "tensors", "files"}
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    config = DeltaConfig(
        base_digest=_set_digest(document["base"]["digest"]),
        target_digest=_set_digest(document["target"]["digest"]),
        base_tensors={str(name): _digest(value) for name, value in document["base"]["tensors"].items()},
        tensors={str(name): DeltaTensor(**tensor) for name, tensor in document["tensors"].items()},
        files={_plain_name(name): _digest(value) for name, value in document["files"].items()},
    )
    for name, tensor in config.tensors.items():
        _digest(tensor.digest)
        if tensor.codec not in CODECS or tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} has codec {tensor.codec!r} and dtype {tensor.dtype!r}")
        if name not in config.base_tensors:
            raise ValueError(f"tensor {name!r} is not in the base")
    return config


def _set_digest(value: str) -> str:
    return "sha256:" + _digest(value.removeprefix("sha256:"))


def _digest(value: str) -> str:
    if len(value) != 64 or int(value, 16) < 0:
        raise ValueError(f"{value!r} is no SHA-256")
    return value


def _plain_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no plain file name")
    return name
