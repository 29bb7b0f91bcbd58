"""Weights stream one by one from every format; damaged and unsafe files are refused."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.gguf import config_from_gguf
from adapters.weights import read_weights, weight_names
from compression.safetensors_writer import SafetensorsWriter
from delta.same_bits import same_bits
from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError

_WEIGHTS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b.weight": torch.linspace(0, 1, 10),
    "b.bias": torch.tensor([1, 2, 3], dtype=torch.int64),
}


def _read(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(path)
    pairs = list(read_weights(checkpoint, {}))
    assert sorted(name for name, _ in pairs) == sorted(weight_names(checkpoint))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _assert_same(weights: dict[str, torch.Tensor]) -> None:
    assert set(weights) == set(_WEIGHTS)
    assert all(same_bits(weights[name], tensor) for name, tensor in _WEIGHTS.items())


def test_one_safetensors_file(tmp_path: Path) -> None:
    save_file(_WEIGHTS, tmp_path / "model.safetensors")
    _assert_same(_read(tmp_path))


def test_sharded_safetensors(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, list(_WEIGHTS), max_shard_bytes=30) as writer:
        for name, tensor in _WEIGHTS.items():
            writer.add(name, tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _assert_same(_read(tmp_path))


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_in_both_container_formats(tmp_path: Path, zipped: bool) -> None:
    torch.save(_WEIGHTS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    _assert_same(_read(tmp_path))


def _sharded_bin(path: Path, second: dict[str, torch.Tensor]) -> None:
    first = {"a.weight": _WEIGHTS["a.weight"]}
    torch.save(first, path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, path / "pytorch_model-00002-of-00002.bin")
    weight_map = {
        name: f"pytorch_model-0000{number}-of-00002.bin"
        for number, names in ((1, first), (2, second))
        for name in names
    }
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_bin(tmp_path: Path) -> None:
    _sharded_bin(tmp_path, {name: _WEIGHTS[name] for name in ("b.weight", "b.bias")})
    _assert_same(_read(tmp_path))


def test_a_tensor_in_two_bin_shards_is_an_error(tmp_path: Path) -> None:
    _sharded_bin(tmp_path, {"b.weight": _WEIGHTS["b.weight"]})
    torch.save(_WEIGHTS, tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"'a\.weight' is both in"):
        list(read_weights(read_checkpoint(tmp_path), {}))


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"a": _RunsCode()}
    if zipped:
        torch.save(content, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        list(read_weights(read_checkpoint(tmp_path), {}))
    assert not (tmp_path / "pwned").exists()


def test_a_truncated_bin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated"):
        list(read_weights(read_checkpoint(tmp_path), {}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bin_files_give_one_kind_of_error(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(10, 3)}, path, _use_new_zipfile_serialization=zipped)
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            list(read_weights(read_checkpoint(tmp_path), {}))
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_a_bin_that_is_no_mapping_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no model checkpoint"):
        list(read_weights(read_checkpoint(tmp_path), {}))


def test_safetensors_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    save_file(_WEIGHTS, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_weights(checkpoint, {}))


def test_gguf_of_the_small_model_equals_the_reference(smollm2_gguf: Path) -> None:
    """All 272 tensors as the `gguf` package dequantizes them, queries and keys reordered."""
    checkpoint = read_checkpoint(smollm2_gguf)
    config = config_from_gguf(checkpoint)
    weights = read_weights(checkpoint, config)
    content = np.memmap(smollm2_gguf, np.uint8, mode="r")
    count = 0
    for header, (name, weight) in zip(checkpoint.tensors.values(), weights, strict=True):
        stored = content[header.offset_bytes : header.offset_bytes + header.num_bytes].reshape(header.shape[0], -1)
        expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[header.dtype]).reshape(header.shape)
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads:
            expected = expected.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(weight.numpy(), expected), name
        count += 1
    assert count == 272
