from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import save, save_file

from registry.errors import CheckpointError
from registry.safetensors_header import read_safetensors_header


def write(path: Path, header: Any, data: bytes = b"", raw: bytes | None = None) -> Path:
    encoded = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.ones((2, 2), dtype=np.float16),
        "scalar": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    headers = read_safetensors_header(path)
    assert headers.keys() == tensors.keys()
    raw = path.read_bytes()
    for name, array in tensors.items():
        header = headers[name]
        assert (header.shape, header.num_bytes, header.file) == (array.shape, array.nbytes, path)
        assert raw[header.offset_bytes : header.offset_bytes + header.num_bytes] == array.tobytes()
    assert headers["weight"].dtype == "F32"


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4, [4])}, b"123", "truncated: its tensors need"),
        ({"a": entry(0, 4, [4])}, b"12345", "1 bytes that belong to no tensor"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"123456", "'b' .* overlaps 'a'"),
        ({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}, b"1234", "overlaps"),
        ({"a": entry(0, 4, [4]), "b": entry(5, 6, [1])}, b"123456", "leaves a hole after 'a'"),
        ({"a": entry(1, 4, [3])}, b"1234", "leaves a hole after 'the header'"),
        ({"a": entry(0, 4, [5])}, b"1234", "is 5 bytes but its data_offsets span 4"),
        ({"a": entry(0, 4, [4], "F99")}, b"1234", "unknown dtype 'F99'"),
        ({"a": entry(4, 0, [4])}, b"1234", "impossible data_offsets"),
        ({"a": entry(-4, 0, [4])}, b"1234", "impossible data_offsets"),
        ({"a": entry(0, 4, [-4])}, b"1234", "impossible shape"),
        ({"a": entry(0, 4, [True])}, b"1234", "impossible shape"),
        ({"a": entry(0, 2**64, [2**64])}, b"1234", "impossible shape"),
        ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", "exactly dtype, shape and data_offsets"),
        ({"a": 1}, b"", "exactly dtype"),
        ({"__metadata__": {"a": 1}}, b"", "not an object of strings"),
        ([1], b"", "JSON list"),
    ],
)
def test_contradictions(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(write(tmp_path / "m.safetensors", header, data))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":{},"a":{}}', "'a' twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8"}}', "'dtype' twice"),
    ],
)
def test_damaged_json(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(write(tmp_path / "m.safetensors", None, raw=raw))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"1234", "cannot hold a safetensors header"),
        (struct.pack("<Q", 2**63), "is no safetensors file: its header claims"),
        (struct.pack("<Q", 1000) + b"{}", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer.*git lfs pull"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(path)


def test_absent_and_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_safetensors_header(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors_header(tmp_path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


_INTACT = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), dtype=np.int8)}, {"format": "pt"})


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(_INTACT) - 1), value=st.integers(0, 255), length=st.integers(0, len(_INTACT)))
def test_a_damaged_byte_or_end_gives_a_checkpoint_error_or_a_consistent_header(
    scratch: Path, position: int, value: int, length: int
) -> None:
    damaged = bytearray(_INTACT)
    damaged[position] = value
    for content in (bytes(damaged), _INTACT[:length]):
        scratch.write_bytes(content)
        try:
            headers = read_safetensors_header(scratch)
        except CheckpointError:
            continue
        assert all(header.offset_bytes + header.num_bytes <= len(content) for header in headers.values())
