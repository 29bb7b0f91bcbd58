"""The header of a GGUF file: key-values and tensor infos, read from a memory map without touching the tensors' data.

    "GGUF" | version u32 | num_tensors u64 | num_key_values u64 | key-values | tensor infos | padding | data

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3, little-endian. Every count is
checked against what the rest of the file could hold before anything of that size is allocated.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from registry.checkpoint_file import file_size
from registry.errors import CheckpointError
from registry.ggml_types import GGML_TYPES
from registry.tensor_header import TensorHeader

_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

_MAX_KEY_VALUES = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_ARRAY_LENGTH = 1 << 24
_MAX_STRING_BYTES = 1 << 24
_MAX_ARRAY_DEPTH = 4
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorHeader]]:
    """Key-values (arrays as lists) and tensors by name, in file order.

    Raises:
        CheckpointError: absent, truncated, no GGUF, an unsupported version or tensor type, or a header that contradicts
            itself or the file's size.
    """
    size = file_size(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(path, data, size)
        num_tensors, num_key_values = reader.preamble()
        metadata: dict[str, Any] = {}
        for _ in range(num_key_values):
            key = reader.string("a key")
            if key in metadata:
                raise CheckpointError(f"{path} names the key {key!r} twice")
            metadata[key] = reader.value(reader.scalar(_U32), key)
        infos = [reader.tensor_info() for _ in range(num_tensors)]
    data_start = _aligned(reader.position, _alignment(path, metadata))
    return metadata, _tensors(path, infos, data_start, _alignment(path, metadata), size)


class _Reader:
    """A cursor over the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.position = 0
        self._data = data
        self._size = size

    def preamble(self) -> tuple[int, int]:
        """Check magic and version; return the numbers of tensors and of key-values."""
        if self._data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file: it does not begin with the letters GGUF")
        self.position = 4
        version = self.scalar(_U32)
        if version not in (2, 3):
            kind = "is big-endian" if version & 0xFFFF == 0 else f"has GGUF version {version}"
            raise CheckpointError(
                f"{self.path} {kind}; supported are versions 2 and 3, little-endian: convert it again"
            )
        num_tensors, num_key_values = self.scalar(_U64), self.scalar(_U64)
        # The shortest tensor info is 24 bytes, the shortest key-value 13.
        self._bound(num_tensors, 24, _MAX_TENSORS, "tensors")
        self._bound(num_key_values, 13, _MAX_KEY_VALUES, "key-values")
        return num_tensors, num_key_values

    def scalar(self, layout: struct.Struct) -> Any:
        start = self.position
        self.position = start + layout.size
        if self.position > self._size:
            raise self._truncated()
        return layout.unpack_from(self._data, start)[0]

    def string(self, what: str) -> str:
        length = self.scalar(_U64)
        self._bound(length, 1, _MAX_STRING_BYTES, f"bytes in {what}")
        start = self.position
        self.position = start + length
        try:
            return self._data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} has {what} at byte {start} that is not UTF-8") from None

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            return self._array(key, depth)
        raise CheckpointError(f"{self.path} has the unknown value type {kind} for the key {key!r}")

    def _array(self, key: str, depth: int) -> list[Any]:
        kind, length = self.scalar(_U32), self.scalar(_U64)
        what = f"elements in {key!r}"
        if kind in _SCALARS:
            layout = _SCALARS[kind]
            self._bound(length, layout.size, _MAX_ARRAY_LENGTH, what)
            start = self.position
            self.position = start + length * layout.size
            return list(struct.unpack_from(f"<{length}{layout.format[-1]}", self._data, start))
        self._bound(length, 8, _MAX_ARRAY_LENGTH, what)
        if kind == _STRING:
            return self._strings(key, length)
        return [self.value(kind, key, depth + 1) for _ in range(length)]

    def _strings(self, key: str, count: int) -> list[str]:
        # Vocabularies and merges are some 10⁵ strings and most of the reading time, so this loop calls nothing of ours.
        data, size, position, unpack = self._data, self._size, self.position, _U64.unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self._truncated()
                strings.append(data[start:position].decode("utf-8"))
        except struct.error:
            raise self._truncated() from None
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: element {len(strings)} of {key!r} is not UTF-8") from None
        self.position = position
        return strings

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape in torch order, type number and offset from the start of the data section."""
        name = self.string("a tensor name")
        num_dims = self.scalar(_U32)
        if num_dims > _MAX_DIMS:
            raise CheckpointError(
                f"tensor {name!r} of {self.path} claims {num_dims} dimensions, GGUF allows {_MAX_DIMS}"
            )
        dims = [self.scalar(_U64) for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self.scalar(_U32), self.scalar(_U64)

    def _bound(self, count: int, min_item_bytes: int, limit: int, what: str) -> None:
        if count > limit:
            raise CheckpointError(f"{self.path} claims {count} {what}, the limit is {limit}: the file is damaged")
        if count * min_item_bytes > self._size - self.position:
            raise self._truncated()

    def _truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated: its header does not fit in its {self._size} bytes; download it again"
        )


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path} has the general.alignment {alignment!r}, which is no power of two")
    return alignment


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _tensors(
    path: Path, infos: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int, size: int
) -> dict[str, TensorHeader]:
    tensors: dict[str, TensorHeader] = {}
    for name, shape, type_number, offset in infos:
        where = f"tensor {name!r} of {path}"
        if name in tensors:
            raise CheckpointError(f"{path} names the tensor {name!r} twice")
        kind = GGML_TYPES.get(type_number)
        if kind is None:
            raise CheckpointError(f"{where} has the unknown GGUF type number {type_number}; convert the model again")
        row = shape[-1] if shape else 1
        if row % kind.block_size:
            raise CheckpointError(
                f"{where}: rows of {row} values are no multiple of {kind.name}'s block of {kind.block_size}"
            )
        if offset % alignment:
            raise CheckpointError(f"{where} begins at {offset}, no multiple of the file's alignment {alignment}")
        num_bytes = math.prod(shape) // kind.block_size * kind.block_bytes
        if data_start + offset + num_bytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {data_start + offset + num_bytes}, "
                f"the file has {size}; download it again"
            )
        tensors[name] = TensorHeader(name, path, kind.name, shape, data_start + offset, num_bytes)
    _check_overlap(path, tensors)
    return tensors


def _check_overlap(path: Path, tensors: dict[str, TensorHeader]) -> None:
    end, previous = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.num_bytes)):
        if tensor.offset_bytes < end:
            raise CheckpointError(f"tensors {previous!r} and {tensor.name!r} of {path} overlap: the file is damaged")
        end, previous = tensor.offset_bytes + tensor.num_bytes, tensor.name
