"""Builds small GGUF files byte by byte, damaged ones too, which the gguf package cannot write."""

from __future__ import annotations

import struct

U32, FLOAT, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key_value(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def text_value(key: str, value: str) -> bytes:
    return key_value(key, STRING, string(value))


def array(kind: int, length: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, length) + items


def tensor_info(name: str, dims: tuple[int, ...], type_number: int = 0, offset: int = 0) -> bytes:
    """`dims` in GGUF's own order, fastest first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_number, offset)


def gguf(
    key_values: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    num_tensors: int | None = None,
    num_key_values: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(infos) if num_tensors is None else num_tensors,
        len(key_values) if num_key_values is None else num_key_values,
    )
    head += b"".join(key_values) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data
