"""Read a delta artifact: a directory with `delta_config.json` and `delta.safetensors` (docs/formats/delta.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from delta.codecs.codec import Term
from delta.codecs.registry import DIFFERENCE_CODECS, WHOLE_CODECS
from delta.delta_config import ROWS, DeltaConfig, DeltaTensor, StoredPart, read_delta_identity
from delta.tensor_digest import tensor_digest
from delta.tensor_file import read_tensor
from registry.errors import CheckpointError
from registry.safetensors_header import read_safetensors_header
from registry.tensor_header import TensorHeader

TENSORS_FILE = "delta.safetensors"
EXTRA_FILES = "files"


@dataclass(frozen=True, slots=True)
class Delta:
    """An opened delta artifact; `digest` is its identity, that of its description."""

    path: Path
    digest: str
    config: DeltaConfig
    _headers: Mapping[str, TensorHeader]
    _opened: FileIO

    def read_terms(self, name: str) -> tuple[Term, ...]:
        """The terms of a changed tensor, in memory of their own.

        Raises:
            CheckpointError: they are not what was written, or not what their codecs write.
        """
        entry = self.config.tensors[name]
        terms = tuple(
            Term(
                term.codec,
                {part: self._read_part(part_key(name, index, part), stored) for part, stored in term.parts.items()},
            )
            for index, term in enumerate(entry.terms)
        )
        try:
            _check(terms, entry)
        except ValueError as error:
            raise CheckpointError(f"{self.path / TENSORS_FILE}: {name!r}: {error}; make the delta again") from error
        return terms

    def _read_part(self, key: str, stored: StoredPart) -> torch.Tensor:
        tensor = read_tensor(self._opened, self._headers[key])
        if tensor_digest(tensor) != stored.digest:
            raise CheckpointError(f"{self.path / TENSORS_FILE}: tensor {key!r} is damaged; copy the delta again")
        return tensor


@contextmanager
def open_delta(path: Path) -> Iterator[Delta]:
    """Open a delta artifact and check that its two files belong together.

    Raises:
        CheckpointError: no delta, damaged, or of a format version or codec that this program does not know.
    """
    digest, config = read_delta_identity(path)
    file = path / TENSORS_FILE
    headers = read_safetensors_header(file)
    expected = {key: (part.dtype, part.shape) for key, part in stored_parts(config).items()}
    if {key: (header.dtype, header.shape) for key, header in headers.items()} != expected:
        raise CheckpointError(f"{file} does not hold the tensors that its description names; copy the delta again")
    try:
        opened = file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy the delta again") from error
    with opened:
        yield Delta(path, digest, config, headers, opened)


def part_key(name: str, index: int, part: str) -> str:
    """The name of a stored part in delta.safetensors, of term `index` of the tensor `name`."""
    return f"{name}/{index}/{part}"


def stored_parts(config: DeltaConfig) -> dict[str, StoredPart]:
    """All tensors of delta.safetensors by name."""
    return {
        part_key(name, index, part): stored
        for name, entry in config.tensors.items()
        for index, term in enumerate(entry.terms)
        for part, stored in term.parts.items()
    }


def _is_exact(rows: torch.Tensor, entry: DeltaTensor) -> bool:
    """Whether their dtype is that of the tensor, or goes into it without rounding."""
    return rows.dtype == entry.torch_dtype or (rows.is_floating_point() and entry.torch_dtype == torch.float32)


def _check(terms: tuple[Term, ...], entry: DeltaTensor) -> None:
    """Raises ValueError."""
    shape = entry.shape
    if terms and terms[-1].codec == ROWS:
        rows = terms[-1].parts.get(ROWS)
        if rows is None or len(terms[-1].parts) > 1 or rows.ndim != len(shape) or not _is_exact(rows, entry):
            raise ValueError("the rows that the base does not have are missing or of another type")
        if rows.ndim == 0 or rows.shape[1:] != shape[1:] or len(rows) > shape[0]:
            raise ValueError(f"the rows that the base does not have are {list(rows.shape)} of {list(shape)}")
        shape = (shape[0] - len(rows), *shape[1:])
    for term in terms:
        if term.codec in DIFFERENCE_CODECS:
            DIFFERENCE_CODECS[term.codec].check(term.parts, (math.prod(shape[:-1]), shape[-1]))
        elif term.codec in WHOLE_CODECS:
            WHOLE_CODECS[term.codec].check(term.parts, entry.torch_dtype, shape)
