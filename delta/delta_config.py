"""delta_config.json: what a delta holds, and what it is bound to (docs/formats/delta.md)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from compression.safetensors_writer import SAFETENSORS_DTYPES
from delta.codecs.registry import DIFFERENCE_CODECS, WHOLE_CODECS
from delta.codecs.replace import REPLACE
from delta.json_record import from_record, to_record
from delta.quality_record import Probe, Quality
from registry.companion_files import is_companion_file
from registry.digest import combine_tensor_digests
from registry.errors import CheckpointError
from registry.safetensors_header import DTYPE_BITS

FORMAT = "rootgraft-delta"
FORMAT_VERSION = 2
CONFIG_FILE = "delta_config.json"
ROWS = "rows"
"""The term of rows that the base does not have; its part is called so too."""

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor of delta.safetensors.

    Attributes:
        dtype: in safetensors' spelling.
        digest: 64 hex digits, by the definition of `registry.digest`.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str

    def __post_init__(self) -> None:
        _check_dtype_and_shape(self.dtype, self.shape)
        _check_hex(self.digest)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class StoredTerm:
    """One term of a tensor's change: a codec of `delta.codecs.registry`, or "rows"."""

    codec: str
    parts: Mapping[str, StoredPart]

    def __post_init__(self) -> None:
        if self.codec not in (*DIFFERENCE_CODECS, *WHOLE_CODECS, ROWS):
            raise ValueError(f"the codec {self.codec!r} is unknown to this program")


@dataclass(frozen=True, slots=True)
class DeltaTensor:
    """A tensor of the fine-tune that is not the base's.

    Attributes:
        dtype, shape: of the tensor that is given back.
        base: the base's tensor that the terms belong to; None: there is none, and the tensor is stored whole.
        terms: in the order in which they are added; "rows" is the last.
        digest: of the tensor that is given back, 64 hex digits.
        error: |W' - given back| / |W' - W| with W' the fine-tune's, Frobenius norms over the rows that the base has;
            0: exact.
    """

    dtype: str
    shape: tuple[int, ...]
    base: str | None
    terms: tuple[StoredTerm, ...]
    digest: str
    error: float

    def __post_init__(self) -> None:
        _check_dtype_and_shape(self.dtype, self.shape)
        _check_hex(self.digest)
        codecs = [term.codec for term in self.terms]
        changing = codecs[:-1] if codecs[-1:] == [ROWS] else codecs
        if ROWS in changing or (len(changing) > 1 and not DIFFERENCE_CODECS.keys() >= set(changing)):
            raise ValueError(f"the terms {codecs} cannot follow each other")
        if self.base is None and not (len(codecs) == 1 and codecs[0] in WHOLE_CODECS):
            raise ValueError("a tensor that the base does not have is not stored whole")
        if codecs != [REPLACE.name] and (len(self.shape) < 2 or 0 in self.shape):
            raise ValueError(f"a tensor with the shape {list(self.shape)} is not stored as it is")
        if self.error < 0:
            raise ValueError(f"the error {self.error} is negative")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def codec(self) -> str:
        """As it is shown: "sign", "sign+lowrank", "lossless+rows"."""
        return "+".join(term.codec for term in self.terms)

    @property
    def num_bytes(self) -> int:
        """What is stored."""
        return sum(part.num_bytes for term in self.terms for part in term.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return self.num_bytes * 8 / max(1, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class DeltaBase:
    """The base that a delta was made from.

    Attributes:
        name, revision: for people.
        digest: "sha256:…" of all its tensors (registry.digest).
        tensors: name -> digest of every one, 64 hex digits.
    """

    name: str
    revision: str | None
    digest: str
    tensors: Mapping[str, str]

    def __post_init__(self) -> None:
        for digest in self.tensors.values():
            _check_hex(digest)
        if self.digest != combine_tensor_digests(self.tensors):
            raise ValueError("base.digest is not that of base.tensors")


@dataclass(frozen=True, slots=True)
class DeltaTarget:
    """The fine-tune.

    Attributes:
        name: for people.
        digest: "sha256:…" of its tensors, as it was given to the maker.
    """

    name: str
    digest: str

    def __post_init__(self) -> None:
        _check_digest(self.digest)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a delta comes from, for people.

    Attributes:
        made_with: program and version.
        source: what it was made or imported from.
        parents: digests of artifacts that it continues or replaces.
    """

    made_with: str
    source: str
    parents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for parent in self.parents:
            _check_digest(parent)


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """delta_config.json.

    Attributes:
        result_digest: "sha256:…" of the tensors that are given back: the target's if every tensor is exact.
        tensors: those of the fine-tune that are not the base's, by name.
        tied: tensors that are copies of another one of the result, by name.
        dropped: tensors of the base that the fine-tune does not have, and the base's tensor that each is a copy of.
        files: name -> SHA-256 in hex of the fine-tune's small files; those that the base does not have alike are kept
            under `files/`.
        license: of the fine-tune, as its maker gave it.
    """

    base: DeltaBase
    target: DeltaTarget
    result_digest: str
    tensors: Mapping[str, DeltaTensor]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    files: Mapping[str, str]
    lineage: Lineage
    license: str | None = None
    quality: Quality | None = None
    probe: Probe | None = None

    def __post_init__(self) -> None:
        for name, digest in self.files.items():
            _check_file_name(name)
            _check_hex(digest)
        for name, tensor in self.tensors.items():
            if tensor.base is None:
                known = name not in self.base.tensors
            else:
                known = tensor.base in self.base.tensors and (tensor.base == name or name not in self.base.tensors)
            if not known:
                raise ValueError(f"tensor {name!r} does not belong to {tensor.base!r} of the base")
        digests = self.base.tensors
        for name, other in self.dropped.items():
            if name in self.tensors or other in self.dropped or digests.get(name, name) != digests.get(other):
                raise ValueError(f"{name!r} is no copy of {other!r} in the base, or was not dropped")
        if self.result_digest != combine_tensor_digests(self.result_tensors()):
            raise ValueError("result_digest is not that of the tensors")

    @property
    def is_exact(self) -> bool:
        return self.result_digest == self.target.digest

    @property
    def misfits(self) -> list[str]:
        """Tensors for which a model of the base's configuration has no place: new ones, and those with new rows."""
        return sorted(
            name
            for name, tensor in self.tensors.items()
            if tensor.base != name or (tensor.terms and tensor.terms[-1].codec == ROWS)
        )

    def result_tensors(self) -> dict[str, str]:
        """Name -> digest in hex of every tensor that is given back; raises ValueError for a copy of none."""
        digests = {name: digest for name, digest in self.base.tensors.items() if name not in self.dropped}
        digests |= {name: tensor.digest for name, tensor in self.tensors.items()}
        for name, other in self.tied.items():
            if name in digests or other not in digests or other in self.tied:
                raise ValueError(f"{name!r} is no copy of {other!r}")
        return digests | {name: digests[other] for name, other in self.tied.items()}

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION} | to_record(self), indent=1) + "\n"


def delta_digest(directory: Path) -> str:
    """Identity of an artifact: SHA-256 of its delta_config.json, which holds the digests of all the rest.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _digest(_read_bytes(directory))


def read_delta_config(directory: Path) -> DeltaConfig:
    """Read and check delta_config.json of a delta directory.

    Raises:
        CheckpointError: no delta, damaged, or of a version or codec that this program does not know.
    """
    return read_delta_identity(directory)[1]


def read_delta_identity(directory: Path) -> tuple[str, DeltaConfig]:
    """`delta_digest` and `read_delta_config` of one read of the file."""
    file = directory / CONFIG_FILE
    content = _read_bytes(directory)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy the delta again") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise CheckpointError(f"{file} is not the description of a delta (its format is not {FORMAT!r})")
    version = document.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}; this program reads version {FORMAT_VERSION}. Make the delta again"
        )
    try:
        return _digest(content), from_record(DeltaConfig, document, "the description")
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; copy the delta again") from error


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _read_bytes(directory: Path) -> bytes:
    file = directory / CONFIG_FILE
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no delta: it has no {CONFIG_FILE}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy the delta again") from error


def _check_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in _DTYPES or any(size < 0 for size in shape):
        raise ValueError(f"there is no tensor of dtype {dtype!r} and shape {list(shape)}")


def _check_digest(value: str) -> None:
    if not value.startswith("sha256:"):
        raise ValueError(f"{value!r} is no digest")
    _check_hex(value.removeprefix("sha256:"))


def _check_hex(value: str) -> None:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{value!r:.80} is no SHA-256")


def _check_file_name(name: str) -> None:
    if Path(name).name != name or "\\" in name or "\0" in name or not is_companion_file(name):
        raise ValueError(f"{name!r} is no name of a model's small file")
