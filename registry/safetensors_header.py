"""The header of a safetensors file, read without torch and without its data.

    0        8                8+N                              end
    | N u64  | JSON, N bytes  | data, tensors one after another |

Source: https://github.com/huggingface/safetensors#format. As that library does, a file is refused whose tensors
overlap, leave holes, or do not fill the data section exactly.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from registry.checkpoint_file import MAX_JSON_BYTES, file_size, parse_json_object
from registry.errors import CheckpointError
from registry.tensor_header import TensorHeader

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits an element of each safetensors dtype."""

_MAX_DIMS = 64


def read_safetensors_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of `path`, by name, in the order of the data.

    Raises:
        CheckpointError: absent, truncated, not safetensors, or a header that contradicts itself or the file's size.
    """
    return read_safetensors_header_and_metadata(path)[0]


def read_safetensors_header_and_metadata(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """As `read_safetensors_header`, and what the writer of `path` had to say.

    Raises:
        CheckpointError: as there.
    """
    header, metadata, data_start, size = _read_header(path)
    tensors = sorted(
        (_tensor(path, name, entry, data_start) for name, entry in header.items()),
        key=lambda tensor: (tensor.offset_bytes, tensor.num_bytes),
    )
    _check_layout(path, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """-> tensors, metadata, where the data begins, size of the file"""
    size = file_size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{path} is truncated: {size} bytes cannot hold a safetensors header; download it again"
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is no safetensors file: its header claims {header_bytes} bytes, the limit is {MAX_JSON_BYTES}"
            )
        if 8 + header_bytes > size:
            raise CheckpointError(
                f"{path} is truncated: its header needs {8 + header_bytes} bytes of {size}; download it again"
            )
        header = parse_json_object(file.read(header_bytes), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    _check_metadata(path, metadata)
    return header, metadata, 8 + header_bytes, size


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the header of {path} has a __metadata__ that is not an object of strings")


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorHeader:
    where = f"tensor {name!r} of {path}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where} has the impossible shape {str(shape)[:100]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has impossible data_offsets {str(offsets)[:100]}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} is {bits / 8:g} bytes but its data_offsets span {end - begin}"
        )
    return TensorHeader(name, path, dtype, tuple(shape), data_start + begin, end - begin)


def _sizes(value: Any) -> bool:
    # bool is an int in Python but not in a header.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, tensors: list[TensorHeader], data_start: int, size: int) -> None:
    expected, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.offset_bytes != expected:
            problem = "overlaps" if tensor.offset_bytes < expected else "leaves a hole after"
            raise CheckpointError(f"tensor {tensor.name!r} of {path} {problem} {previous!r}: the file is damaged")
        expected, previous = tensor.offset_bytes + tensor.num_bytes, tensor.name
    if expected > size:
        raise CheckpointError(
            f"{path} is truncated: its tensors need {expected} bytes, the file has {size}; download it again"
        )
    if expected < size:
        raise CheckpointError(f"{path} has {size - expected} bytes that belong to no tensor: the file is damaged")
