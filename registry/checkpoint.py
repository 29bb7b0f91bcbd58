"""A model checkpoint on disk: which files, and what their headers say. No torch, no tensor data is read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from registry.checkpoint_file import file_size, read_json_file
from registry.errors import CheckpointError
from registry.gguf_header import read_gguf_header
from registry.safetensors_header import read_safetensors_header
from registry.tensor_header import TensorHeader

__all__ = ["Checkpoint", "TensorHeader", "read_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weight files of one model.

    Attributes:
        path: the directory, or the GGUF file, that was asked for.
        format: how the weights are written.
        files: the weight files, in a stable order.
        tensors: every tensor by name; empty for `bin`, because a pickle has no header that can be read safely.
        metadata: GGUF key-values, arrays as lists; empty otherwise.
    """

    path: Path
    format: Literal["safetensors", "gguf", "bin"]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Find and check the weight files of `path`: a directory or one `.gguf` file.

    In a directory the order of preference is transformers': model.safetensors, model.safetensors.index.json,
    pytorch_model.bin, pytorch_model.bin.index.json; then a single .gguf file.

    Raises:
        CheckpointError: nothing there, files missing, truncated or contradicting each other.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(path, path)
        raise CheckpointError(f"{path} is a file; give the checkpoint's directory or a .gguf file")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a checkpoint directory or a .gguf file")
    if (path / "model.safetensors").exists():
        return _safetensors(path, None)
    if (path / "model.safetensors.index.json").exists():
        return _safetensors(path, _read_index(path / "model.safetensors.index.json"))
    if (path / "pytorch_model.bin").exists():
        return _bin(path, (path / "pytorch_model.bin",))
    if (path / "pytorch_model.bin.index.json").exists():
        index = _read_index(path / "pytorch_model.bin.index.json")
        return _bin(path, tuple(path / name for name in sorted(set(index.values()))))
    return _without_standard_names(path)


def _without_standard_names(path: Path) -> Checkpoint:
    ggufs = sorted(path.glob("*.gguf"))
    safetensors = sorted(path.glob("*.safetensors"))
    shards = sorted(path.glob("pytorch_model*.bin"))
    if len(ggufs) == 1 and not safetensors and not shards:
        return _gguf(path, ggufs[0])
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path} holds a LoRA adapter, not a model; give its base model's directory")
    if len(shards) == 1:
        return _bin(path, (shards[0],))
    if safetensors or shards:
        index = "model.safetensors.index.json" if safetensors else "pytorch_model.bin.index.json"
        names = ", ".join(file.name for file in (safetensors or shards)[:4])
        raise CheckpointError(
            f"{path} holds {names} but no {index}, which says what belongs to the model; download it too"
        )
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:4])
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files ({names}); give the path of one of them")
    raise CheckpointError(f"{path} holds no weights: no model.safetensors, pytorch_model.bin or .gguf file")


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name to shard file name, each shard present."""
    weight_map = read_json_file(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{path} places {name!r} in {shard!r}, which is no file name beside the index")
    absent = sorted(shard for shard in set(weight_map.values()) if not (path.parent / shard).is_file())
    if absent:
        raise CheckpointError(f"{path} names {len(absent)} absent shards ({', '.join(absent[:4])}); download them")
    return weight_map


def _safetensors(path: Path, index: dict[str, str] | None) -> Checkpoint:
    shards = ["model.safetensors"] if index is None else sorted(set(index.values()))
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, tensor in read_safetensors_header(path / shard).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is both in {tensors[name].file.name} and in {shard}")
            if index is not None and index.get(name) != shard:
                placed = f"places it in {index[name]}" if name in index else "does not name it"
                raise CheckpointError(f"{path}: tensor {name!r} is in {shard} but the index {placed}")
            tensors[name] = tensor
    absent = sorted(index.keys() - tensors.keys()) if index else []
    if absent:
        names = ", ".join(absent[:4])
        raise CheckpointError(f"{path}: the index names {len(absent)} tensors that no shard holds ({names})")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Checkpoint(
        path, "safetensors", tuple(path / shard for shard in shards), MappingProxyType(tensors), _NO_METADATA
    )


def _bin(path: Path, files: tuple[Path, ...]) -> Checkpoint:
    for file in files:
        file_size(file)
        with file.open("rb") as opened:
            is_zip = opened.read(4) == b"PK\x03\x04"
        # A zip archive ends with its directory, so one that was cut short is recognised without unpickling anything.
        if is_zip and not _is_whole_zip(file):
            raise CheckpointError(f"{file} is truncated or damaged; download it again")
    return Checkpoint(path, "bin", files, MappingProxyType({}), _NO_METADATA)


def _is_whole_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # a directory that contradicts itself
        return False


def _gguf(path: Path, file: Path) -> Checkpoint:
    metadata, tensors = read_gguf_header(file)
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(f"{file} is one part of a split GGUF; merge the parts with `llama-gguf-split --merge`")
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return Checkpoint(path, "gguf", (file,), MappingProxyType(tensors), MappingProxyType(metadata))


_NO_METADATA: Mapping[str, Any] = MappingProxyType({})
