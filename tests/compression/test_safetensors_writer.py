"""The streaming writer against the safetensors library."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compression.safetensors_writer import SAFETENSORS_DTYPES, SafetensorsWriter
from delta.same_bits import same_bits
from registry.checkpoint import read_checkpoint
from registry.errors import CheckpointError


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{SAFETENSORS_DTYPES[dtype]}": torch.randn(5, 7, generator=generator).mul(3).to(dtype)
        for dtype in SAFETENSORS_DTYPES
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "transposed": torch.randn(6, 4).t()}
    tensors['odd "name" é'] = torch.randn(3).bfloat16()
    return tensors


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = _tensors()
    with SafetensorsWriter(tmp_path, list(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.full((16, 16), float(index)) for index in range(7)}  # 1 KiB each
    with SafetensorsWriter(tmp_path, list(tensors), max_shard_bytes=3000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 1024
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])
    assert set(read_checkpoint(tmp_path).tensors) == set(tensors)


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, ["a", "b"], max_shard_bytes=10) as writer:
        writer.add("a", torch.zeros(100))
        writer.add("b", torch.zeros(100))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_misuse_is_refused(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path, ["a", "c"]) as writer:
        writer.add("a", torch.zeros(3))  # 12 bytes: held back
        for name, tensor in (
            ("a", torch.zeros(3)),
            ("b", torch.zeros(2)),
            ("c", torch.zeros(2, dtype=torch.complex64)),
        ):
            with pytest.raises(CheckpointError, match=name):
                writer.add(name, tensor)


def test_an_error_leaves_no_finished_file(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, ["a"])
    with pytest.raises(CheckpointError), writer:
        writer.add("not announced", torch.zeros(4))
    writer = SafetensorsWriter(tmp_path, ["a", "b"])
    with suppress(ZeroDivisionError), writer:
        writer.add("a", torch.zeros(4))
        _ = 1 / 0
    assert not list(tmp_path.glob("*.safetensors"))
