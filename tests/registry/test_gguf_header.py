from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from registry.errors import CheckpointError
from registry.ggml_types import GGML_TYPES, SUPPORTED_GGML_TYPES
from registry.gguf_header import read_gguf_header
from tests.fakes.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT,
    STRING,
    U32,
    U64,
    array,
    gguf,
    key_value,
    string,
    tensor_info,
    text_value,
)

ARCHITECTURE = text_value("general.architecture", "llama")


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return path


def refuse(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf_header(write(tmp_path, content))


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("flag", True)
    writer.add_array("words", ["a", "ü", ""])
    writer.add_array("numbers", [1, -2, 3])
    weight = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("weight", weight)
    packed = np.zeros((4, 40), dtype=np.uint8)
    writer.add_tensor("packed", packed, raw_dtype=package.GGMLQuantizationType.Q4_1)
    writer.add_tensor("half", np.ones((3,), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata, tensors = read_gguf_header(path)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.context_length"] == 8192
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert metadata["flag"] is True
    assert metadata["words"] == ["a", "ü", ""]
    assert metadata["numbers"] == [1, -2, 3]
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        "weight": ("F32", (2, 32)), "packed": ("Q4_1", (4, 64)), "half": ("F16", (3,)),
    }  # fmt: skip
    theirs = {tensor.name: tensor for tensor in package.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        assert (tensor.offset_bytes, tensor.num_bytes) == (theirs[name].data_offset, theirs[name].n_bytes)
    raw = path.read_bytes()
    start = tensors["weight"].offset_bytes
    assert raw[start : start + tensors["weight"].num_bytes] == weight.tobytes()


def test_the_type_table_is_ggmls() -> None:
    package = pytest.importorskip("gguf")
    theirs = {
        kind.value: (kind.name, *package.GGML_QUANT_SIZES[kind])
        for kind in package.GGMLQuantizationType
        if kind.value in GGML_TYPES
    }
    assert {number: (t.name, t.block_size, t.block_bytes) for number, t in GGML_TYPES.items()} == theirs
    assert {kind.name for kind in GGML_TYPES.values()} >= SUPPORTED_GGML_TYPES


def test_every_kind_of_value(tmp_path: Path) -> None:
    nested = array(ARRAY, 2, array(U32, 1, struct.pack("<I", 5)) + array(STRING, 1, string("x")))
    content = gguf(
        [
            key_value("u64", U64, struct.pack("<Q", 2**63)),
            key_value("bool", BOOL, b"\0"),
            key_value("float", FLOAT, struct.pack("<f", 0.5)),
            key_value("bools", ARRAY, array(BOOL, 2, b"\0\1")),
            key_value("nested", ARRAY, nested),
            key_value("none", ARRAY, array(STRING, 0, b"")),
        ],
        [],
        version=2,
    )
    metadata, tensors = read_gguf_header(write(tmp_path, content))
    assert metadata == {
        "u64": 2**63, "bool": False, "float": 0.5, "bools": [False, True], "nested": [[5], ["x"]], "none": [],
    }  # fmt: skip
    assert tensors == {}


def test_alignment_is_respected(tmp_path: Path) -> None:
    content = gguf(
        [key_value("general.alignment", U32, struct.pack("<I", 64))],
        [tensor_info("a", (2,))],
        struct.pack("<2f", 1, 2),
        alignment=64,
    )
    _, tensors = read_gguf_header(write(tmp_path, content))
    assert tensors["a"].offset_bytes % 64 == 0
    start = tensors["a"].offset_bytes
    assert struct.unpack("<2f", content[start : start + 8]) == (1, 2)


def test_types_that_cannot_be_loaded_still_have_a_name(tmp_path: Path) -> None:
    _, tensors = read_gguf_header(write(tmp_path, gguf([], [tensor_info("a", (32,), 6)], bytes(22))))
    assert tensors["a"].dtype == "Q5_0"
    assert tensors["a"].dtype not in SUPPORTED_GGML_TYPES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(40), "no GGUF file"),
        (gguf([], [], version=1), "GGUF version 1; supported are versions 2 and 3"),
        (gguf([], [], version=4), "GGUF version 4"),
        (gguf([], [], version=3 << 24), "big-endian"),
        (b"GGUF\3\0\0\0", "truncated"),
        (b"GG", "no GGUF file"),
        (gguf([], [], num_tensors=2**62), "claims .* tensors, the limit"),
        (gguf([], [], num_tensors=1000), "truncated"),
        (gguf([], [], num_key_values=2**40), "claims .* key-values, the limit"),
        (gguf([struct.pack("<Q", 2**60) + bytes(8)], []), "claims .* bytes in a key, the limit"),
        (gguf([struct.pack("<Q", 2**20)], []), "truncated"),
        (gguf([key_value("k", ARRAY, array(U32, 2**60, b""))], []), "claims .* elements in 'k', the limit"),
        (gguf([key_value("k", ARRAY, array(U32, 2**20, b""))], []), "truncated"),
        (gguf([key_value("k", ARRAY, array(STRING, 2**20, b""))], []), "truncated"),
        (gguf([key_value("k", ARRAY, array(STRING, 1, struct.pack("<Q", 2**40)))], []), "truncated"),
        (gguf([key_value("k", ARRAY, array(STRING, 1, string(b"\xff")))], []), "element 0 of 'k' is not UTF-8"),
        (gguf([key_value("k", ARRAY, array(ARRAY, 1, b"") * 9)], []), "unknown value type 9"),
        (gguf([key_value("k", 13, b"")], []), "unknown value type 13 for the key 'k'"),
        (gguf([key_value("k", STRING, string(b"\xff"))], []), "not UTF-8"),
        (gguf([ARCHITECTURE, ARCHITECTURE], []), "key 'general.architecture' twice"),
        (gguf([key_value("general.alignment", U32, struct.pack("<I", 33))], []), "no power of two"),
        (gguf([key_value("general.alignment", U32, struct.pack("<I", 0))], []), "no power of two"),
        (gguf([], [tensor_info("a", (8,))], bytes(31)), "truncated: tensor 'a' ends at"),
        (gguf([], [tensor_info("a", (2**40, 2**40))], bytes(64)), "truncated: tensor 'a' ends at"),
        (gguf([], [tensor_info("a", (8,), 99)], bytes(32)), "unknown GGUF type number 99"),
        (gguf([], [tensor_info("a", (8,), 4)], bytes(32)), "unknown GGUF type number 4"),
        (gguf([], [tensor_info("a", (33,), 2)], bytes(64)), "no multiple of Q4_0's block of 32"),
        (gguf([], [tensor_info("a", (8,), 0, 8)], bytes(64)), "no multiple of the file's alignment 32"),
        (gguf([], [tensor_info("a", (1, 1, 1, 1, 1))], bytes(32)), "claims 5 dimensions"),
        (gguf([], [tensor_info("a", (8,)), tensor_info("a", (8,))], bytes(64)), "tensor 'a' twice"),
        (gguf([], [tensor_info("a", (16,)), tensor_info("b", (8,), 0, 32)], bytes(64)), "'a' and 'b' .* overlap"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"", "is empty"),
    ],
)
def test_refused(tmp_path: Path, content: bytes, message: str) -> None:
    refuse(tmp_path, content, message)


def test_an_absurd_count_allocates_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, gguf([key_value("k", ARRAY, array(U64, 2**24, b""))], []))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


_INTACT = gguf(
    [ARCHITECTURE, key_value("words", ARRAY, array(STRING, 3, string("a") + string("bc") + string("")))],
    [tensor_info("a", (32, 2), 2), tensor_info("b", (8,), 0, 64)],
    bytes(96),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.gguf"


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(_INTACT) - 1), value=st.integers(0, 255), length=st.integers(0, len(_INTACT)))
def test_a_damaged_byte_or_end_gives_a_checkpoint_error_or_a_consistent_header(
    scratch: Path, position: int, value: int, length: int
) -> None:
    damaged = bytearray(_INTACT)
    damaged[position] = value
    for content in (bytes(damaged), _INTACT[:length]):
        scratch.write_bytes(content)
        try:
            _, tensors = read_gguf_header(scratch)
        except CheckpointError:
            continue
        assert all(tensor.offset_bytes + tensor.num_bytes <= len(content) for tensor in tensors.values())
