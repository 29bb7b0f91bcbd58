"""The two files of an adapter: where they are, their content, its digest, and their tensors."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delta.peft.adapter_config import CONFIG_FILE
from registry.errors import CheckpointError
from registry.safetensors_header import read_safetensors_header_and_metadata
from registry.tensor_header import TensorHeader

WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""The first that exists is read, as by PEFT."""

_PREFIX = "base_model.model."
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def config_file(directory: Path) -> Path:
    """Raises CheckpointError: there is none, or a link that leads out of the directory."""
    return _file_in(directory, CONFIG_FILE)


def weights_file(directory: Path) -> Path:
    """Raises CheckpointError: there is none, or a link that leads out of the directory."""
    for name in WEIGHTS_FILES:
        if os.path.lexists(directory / name):
            return _file_in(directory, name)
    raise CheckpointError(f"{directory} holds no {' or '.join(WEIGHTS_FILES)}; is this an adapter's directory?")


class FileContent(NamedTuple):
    """A file of an adapter, read once, so that what is hashed is what is computed with.

    Attributes:
        data: [size] uint8
    """

    file: Path
    data: Tensor


def read_content(file: Path) -> FileContent:
    """Read, not mapped: touching a mapped file that has been cut short in the meantime would end the process.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with file.open("rb", buffering=0) as opened:
            data = torch.empty(os.fstat(opened.fileno()).st_size, dtype=torch.uint8)
            rest = data.numpy().data
            while num_read := opened.readinto(rest):
                rest = rest[num_read:]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    return FileContent(file, data[: len(data) - len(rest)])


def adapter_digest(files: Iterable[FileContent]) -> str:
    """Identity of an adapter: SHA-256 over name, size and bytes of its two files. -> "sha256:..." """
    hasher = hashlib.sha256()
    for file, data in files:
        hasher.update(f"{file.name}\0{len(data)}\0".encode())
        hasher.update(data.numpy().data)
    return f"sha256:{hasher.hexdigest()}"


class AdapterTensors:
    """The tensors of a weights file, each to be taken exactly once. Names are without "base_model.model.".

    Attributes:
        file: for messages, and
        config_file: for messages.
        metadata: of the safetensors header.

    Args:
        read: a tensor by its full name.
        known_finite: all tensors are.
    """

    def __init__(
        self,
        file: Path,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
        *,
        known_finite: bool = False,
    ) -> None:
        self.file = file
        self.config_file = file.with_name(CONFIG_FILE)
        self.metadata = metadata
        self._shapes = shapes
        self._read = read
        self._known_finite = known_finite
        self._rest = dict.fromkeys(shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def any_below(self, path: str) -> bool:
        """Some tensor belongs to the module `path` or to one inside it."""
        return path in self._paths

    @cached_property
    def _paths(self) -> set[str]:
        parts = [name.split(".") for name in self._shapes]
        return {".".join(path[:length]) for path in parts for length in range(1, len(path))}

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError: there is no such tensor."""
        if name not in self._shapes:
            raise CheckpointError(
                f"{self.file}: the tensor {_PREFIX}{name} is missing, which adapter_config.json and the base call for"
            )
        return self._shapes[name]

    def peek(self, name: str) -> Tensor:
        """A tensor that somebody else is to take, who looks at what it holds."""
        return self._read(_PREFIX + name)

    def take(self, name: str, shape: tuple[int, ...], hint: str = "") -> Tensor:
        """A tensor: contiguous, finite, in the file's dtype (float64 becomes float32), perhaps a part of its content.

        Raises:
            CheckpointError: it is missing, taken already, of another shape or type, not finite, or cannot be read.
        """
        if (found := self.shape(name)) != shape:
            raise CheckpointError(
                f"{self.file}: {_PREFIX}{name} is {list(found)}, but this base and adapter_config.json need "
                f"{list(shape)}{hint or '; was it trained on another base?'}"
            )
        if name not in self._rest:
            raise CheckpointError(f"{self.config_file} uses {_PREFIX}{name} twice; correct its fields")
        del self._rest[name]
        try:
            tensor = self._read(_PREFIX + name)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.file}: {_PREFIX}{name} cannot be read ({error}); copy the file again"
            ) from error
        if tensor.dtype not in _DTYPES.values():
            raise CheckpointError(
                f"{self.file}: {_PREFIX}{name} is of type {tensor.dtype}; save the adapter in float32"
            )
        if not self._known_finite and not all_finite(tensor):
            raise CheckpointError(f"{self.file}: {_PREFIX}{name} holds values that are not finite; train it again")
        dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        return tensor.to(dtype, memory_format=torch.contiguous_format)

    def check_all_taken(self) -> None:
        """Raises CheckpointError: a tensor has no place in the adapter that the configuration describes."""
        if self._rest:
            names = [_PREFIX + name for name in list(self._rest)[:3]]
            more = f" and {len(self._rest) - 3} more" if len(self._rest) > 3 else ""
            raise CheckpointError(
                f"{self.file}: {', '.join(names)}{more} have no place: the base has no such module, or "
                "adapter_config.json does not name it. Save the adapter again, for this base"
            )


def all_finite(tensor: Tensor) -> bool:
    """Several times as fast as `isfinite` on each value; a NaN is both the least and the greatest value."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def open_tensors(weights: FileContent) -> AdapterTensors:
    """The tensors of a weights file. Raises CheckpointError: it is truncated, damaged or not an adapter's."""
    if weights.file.suffix == ".bin":
        return _load_pickle(weights)
    headers, metadata = read_safetensors_header_and_metadata(weights.file)
    shapes = {name: header.shape for name, header in headers.items()}
    return AdapterTensors(
        weights.file,
        _without_prefix(weights.file, shapes),
        lambda name: _tensor_at(weights.data, headers[name]),
        metadata,
        known_finite=_known_finite(weights.data, list(headers.values())),
    )


def _tensor_at(data: Tensor, header: TensorHeader) -> Tensor:
    """A view, but for a tensor that begins where none of its type can.

    Raises:
        CheckpointError: it is of a type that adapters do not have.
        RuntimeError: the data ends before it.
    """
    if header.dtype not in _DTYPES:
        raise CheckpointError(f"{header.file}: {header.name} is of type {header.dtype}; save the adapter in float32")
    dtype = _DTYPES[header.dtype]
    piece = data[header.offset_bytes : header.offset_bytes + header.num_bytes]
    return (piece.clone() if header.offset_bytes % dtype.itemsize else piece).view(dtype).view(header.shape)


def _known_finite(data: Tensor, headers: Sequence[TensorHeader]) -> bool:
    """All values are finite, as one look at those of a file of one type shows; False: each has to be looked at."""
    if len({header.dtype for header in headers}) != 1 or headers[0].dtype not in _DTYPES:
        return False
    dtype = _DTYPES[headers[0].dtype]
    values = data[headers[0].offset_bytes :]  # headers are in the order of the data, which has no holes
    aligned = not headers[0].offset_bytes % dtype.itemsize and not len(values) % dtype.itemsize
    return aligned and all_finite(values.view(dtype))


def _load_pickle(weights: FileContent) -> AdapterTensors:
    file = weights.file
    try:
        loaded: Any = torch.load(io.BytesIO(weights.data.numpy().data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{file} cannot be read ({error}); save the adapter as safetensors") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise CheckpointError(f"{file} does not hold named tensors; save the adapter as safetensors")
    shapes = {str(name): tuple(tensor.shape) for name, tensor in loaded.items()}
    # Tensors of a pickle may be parts of larger ones.
    return AdapterTensors(file, _without_prefix(file, shapes), lambda name: loaded[name].clone(), {})


def _without_prefix(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    for name in shapes:
        if not name.startswith(_PREFIX):
            raise CheckpointError(
                f"{file}: the tensor {name} does not start with {_PREFIX!r}; save the adapter with PEFT"
            )
    return {name.removeprefix(_PREFIX): shape for name, shape in shapes.items()}


def _file_in(directory: Path, name: str) -> Path:
    file = directory / name
    try:
        resolved = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} is missing; is this an adapter's directory?") from error
    if not resolved.is_relative_to(directory.resolve()) or not resolved.is_file():
        raise CheckpointError(f"{file} is no plain file of its directory (a link out of it?); copy the file there")
    return file
