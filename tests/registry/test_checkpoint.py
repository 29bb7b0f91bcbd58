from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError
from tests.fakes.gguf_bytes import U32, gguf, key_value, tensor_info, text_value


def shard(path: Path, *names: str) -> None:
    save_file({name: np.zeros((2, 2), dtype=np.float32) for name in names}, path)


def index(directory: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)


def small_gguf(path: Path, *extra: bytes) -> None:
    path.write_bytes(gguf([text_value("general.architecture", "llama"), *extra], [tensor_info("a", (8,))], bytes(32)))


def refuse(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_single_safetensors(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a", "b")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert checkpoint.files == (tmp_path / "model.safetensors",)
    assert checkpoint.tensors.keys() == {"a", "b"}
    assert checkpoint.metadata == {}
    with pytest.raises(TypeError):
        checkpoint.tensors["c"] = checkpoint.tensors["a"]  # type: ignore[index]


def test_sharded_safetensors(tmp_path: Path) -> None:
    shard(tmp_path / "m-2.safetensors", "b")
    shard(tmp_path / "m-1.safetensors", "a", "c")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"})
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.files == (tmp_path / "m-1.safetensors", tmp_path / "m-2.safetensors")
    assert {name: tensor.file.name for name, tensor in checkpoint.tensors.items()} == {
        "a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "m-1.safetensors", "b": "m-9.safetensors"}, r"names 1 absent shards \(m-9.safetensors\)"),
        ({"a": "m-1.safetensors", "z": "m-1.safetensors"}, r"1 tensors that no shard holds \(z\)"),
        ({"a": "m-1.safetensors", "b": "m-2.safetensors"}, "tensor 'c' is in m-2.safetensors but the index does not"),
        ({"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}, "the index places it in m-1"),
        ({"a": "../m-1.safetensors"}, "no file name beside the index"),
        ({"a": "/etc/passwd"}, "no file name beside the index"),
        ({"a": ".."}, "no file name beside the index"),
        ({"a": 3}, "no file name beside the index"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_contradicting_index(tmp_path: Path, weight_map: object, message: str) -> None:
    shard(tmp_path / "m-1.safetensors", "a")
    shard(tmp_path / "m-2.safetensors", "b", "c")
    index(tmp_path, weight_map)
    refuse(tmp_path, message)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shard(tmp_path / "m-1.safetensors", "a", "b")
    shard(tmp_path / "m-2.safetensors", "a", "c")
    index(tmp_path, {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"})
    refuse(tmp_path, "tensor 'a' is both in m-1.safetensors and in m-2.safetensors")


def test_damaged_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refuse(tmp_path, "model.safetensors.index.json is not valid JSON")


def test_safetensors_go_before_bin(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a")
    zip_file(tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).format == "safetensors"


def test_bin(tmp_path: Path) -> None:
    zip_file(tmp_path / "pytorch_model.bin")
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.tensors) == ("bin", {})
    assert checkpoint.files == (tmp_path / "pytorch_model.bin",)


def test_sharded_bin(tmp_path: Path) -> None:
    for name in ("pytorch_model-1.bin", "pytorch_model-2.bin"):
        zip_file(tmp_path / name)
    refuse(tmp_path, "no pytorch_model.bin.index.json")
    index(tmp_path, {"a": "pytorch_model-2.bin", "b": "pytorch_model-1.bin"}, "pytorch_model.bin.index.json")
    assert [file.name for file in read_checkpoint(tmp_path).files] == ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    (tmp_path / "pytorch_model-2.bin").unlink()
    refuse(tmp_path, "absent shards")


def test_truncated_bin(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    zip_file(path)
    path.write_bytes(path.read_bytes()[:500])
    refuse(tmp_path, "pytorch_model.bin is truncated")


def test_gguf_file_and_directory(tmp_path: Path) -> None:
    small_gguf(tmp_path / "m.gguf")
    for path in (tmp_path, tmp_path / "m.gguf"):
        checkpoint = read_checkpoint(path)
        assert (checkpoint.path, checkpoint.format, checkpoint.files) == (path, "gguf", (tmp_path / "m.gguf",))
        assert checkpoint.metadata["general.architecture"] == "llama"
    small_gguf(tmp_path / "n.gguf")
    refuse(tmp_path, r"holds 2 GGUF files \(m.gguf, n.gguf\); give the path of one")


def test_split_gguf(tmp_path: Path) -> None:
    small_gguf(tmp_path / "m.gguf", key_value("split.count", U32, b"\2\0\0\0"))
    refuse(tmp_path, "one part of a split GGUF")


def test_lora_adapter_is_no_model(tmp_path: Path) -> None:
    shard(tmp_path / "adapter_model.safetensors", "a")
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(tmp_path, "holds a LoRA adapter")


def test_shards_without_index(tmp_path: Path) -> None:
    shard(tmp_path / "model-00001-of-00002.safetensors", "a")
    refuse(tmp_path, "no model.safetensors.index.json")


def test_no_weights_no_directory_other_file(tmp_path: Path) -> None:
    refuse(tmp_path, "holds no weights")
    refuse(tmp_path / "none", "does not exist")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refuse(tmp_path / "model.safetensors", "is a file; give the checkpoint's directory")


def test_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse(tmp_path, "git lfs pull")


def test_checkpoint_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    refuse(tmp_path, "holds no tensors")
