from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.checkpoint import Checkpoint, read_checkpoint
from registry.digest import base_digest, combine_tensor_digests, header_digest, tensor_hasher
from registry.errors import CheckpointError
from tests.fakes.gguf_bytes import gguf, tensor_info

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.ones(4, dtype=np.float16),
    "c": np.zeros((0, 2), dtype=np.int8),
}


def single(directory: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Checkpoint:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata)
    return read_checkpoint(directory)


def sharded(directory: Path, *shards: dict[str, np.ndarray]) -> Checkpoint:
    directory.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, directory / f"m-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"m-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return read_checkpoint(directory)


def test_the_definition(tmp_path: Path) -> None:
    array = TENSORS["b"]
    tensor = hashlib.sha256(b'["F32",[2,3]]\n' + array.tobytes()).hexdigest()
    expected = hashlib.sha256(b'rootgraft base 1\n[["b","' + tensor.encode() + b'"]]').hexdigest()
    checkpoint = single(tmp_path / "m", {"b": array})
    assert base_digest(checkpoint) == f"sha256:{expected}"
    header = hashlib.sha256(b'rootgraft header 1\n[["b","F32",[2,3]]]').hexdigest()
    assert header_digest(checkpoint) == f"sha256:{header}"
    hasher = tensor_hasher("F32", (2, 3))
    hasher.update(array.tobytes())
    assert combine_tensor_digests({"b": hasher.hexdigest()}) == f"sha256:{expected}"


def test_independent_of_sharding_order_and_metadata(tmp_path: Path) -> None:
    one = single(tmp_path / "one", TENSORS)
    others = [
        single(tmp_path / "meta", TENSORS, {"format": "pt"}),
        sharded(tmp_path / "two", {"a": TENSORS["a"]}, {"b": TENSORS["b"], "c": TENSORS["c"]}),
        sharded(tmp_path / "three", {"c": TENSORS["c"]}, {"b": TENSORS["b"]}, {"a": TENSORS["a"]}),
    ]
    for other in others:
        assert base_digest(other) == base_digest(one)
        assert header_digest(other) == header_digest(one)


def test_every_difference_changes_it(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    changed = array.copy()
    changed[5] = 7
    variants = {
        "same": {"x": array},
        "value": {"x": changed},
        "shape": {"x": array.reshape(2, 3)},
        "dtype": {"x": array.view(np.int32)},
        "name": {"y": array},
        "more": {"x": array, "y": array},
    }
    checkpoints = {name: single(tmp_path / name, tensors) for name, tensors in variants.items()}
    assert len({base_digest(checkpoint) for checkpoint in checkpoints.values()}) == len(variants)
    # A header does not see values.
    assert header_digest(checkpoints["same"]) == header_digest(checkpoints["value"])
    assert len({header_digest(checkpoint) for checkpoint in checkpoints.values()}) == len(variants) - 1


def test_two_tensors_that_swap_their_names(tmp_path: Path) -> None:
    p, q = np.zeros(3, dtype=np.float32), np.ones(3, dtype=np.float32)
    assert base_digest(single(tmp_path / "1", {"p": p, "q": q})) != base_digest(
        single(tmp_path / "2", {"p": q, "q": p})
    )


def test_gguf(tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    a, b = np.arange(8, dtype=np.float32).tobytes(), np.ones(8, dtype=np.float32).tobytes()
    one.write_bytes(gguf([], [tensor_info("a", (8,)), tensor_info("b", (8,), 0, 32)], a + b))
    two.write_bytes(gguf([], [tensor_info("b", (8,)), tensor_info("a", (8,), 0, 32)], b + a))
    assert base_digest(read_checkpoint(one)) == base_digest(read_checkpoint(two))


def test_bin_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"x")
    checkpoint = read_checkpoint(tmp_path)
    before = base_digest(checkpoint)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("data.pkl", b"y")
    assert base_digest(checkpoint) != before
    with pytest.raises(CheckpointError, match="no header to digest"):
        header_digest(checkpoint)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    base_digest(single(tmp_path / "m", {"a": np.zeros(3_000_000, dtype=np.float32)}), lambda *call: calls.append(call))
    assert len(calls) > 1
    assert calls[-1] == (12_000_000, 12_000_000)
    assert calls == sorted(calls)


def test_a_file_that_shrinks_or_vanishes_meanwhile(tmp_path: Path) -> None:
    checkpoint = single(tmp_path / "m", TENSORS)
    path = checkpoint.files[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="became shorter"):
        base_digest(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        base_digest(checkpoint)
