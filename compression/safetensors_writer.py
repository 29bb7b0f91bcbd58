"""Write safetensors files tensor by tensor, so that a model larger than memory can be converted.

    header length u64 | header JSON, padded with spaces | data of each tensor, without gaps

The length of the header is fixed before the first tensor (an upper bound from the names), its text is written last: so
neither dtypes nor the number of shards need to be known beforehand.

Source: https://github.com/huggingface/safetensors (format section of the README).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from registry.errors import CheckpointError

SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

MAX_SHARD_BYTES = 5_000_000_000

_HEADER_ALIGNMENT_BYTES = 64
# Of one entry beside its name: dtype, eight dimensions and two offsets, all at their longest.
_MAX_ENTRY_BYTES = 320
# The largest element: a tensor that ends on this boundary leaves every next one aligned.
_DATA_ALIGNMENT_BYTES = 8


class SafetensorsWriter:
    """Writes `stem.safetensors` into a directory, or shards and an index if it grows above `max_shard_bytes`.

    A context manager: a normal exit finishes the files. Until then the directory is incomplete, so it should be a
    staged one. Tensors whose size is no multiple of 8 bytes are kept in memory until the end, so that they misalign no
    other.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        *,
        stem: str = "model",
        max_shard_bytes: int | None = MAX_SHARD_BYTES,
    ) -> None:
        """
        Args:
            names: at least those that will be added, to reserve the header.
            max_shard_bytes: None: always one file.
        """
        self._directory = directory
        self._stem = stem
        self._max_shard_bytes = math.inf if max_shard_bytes is None else max_shard_bytes
        reserved = 64 + sum(len(json.dumps(name)) + _MAX_ENTRY_BYTES for name in names)
        self._header_bytes = -(-reserved // _HEADER_ALIGNMENT_BYTES) * _HEADER_ALIGNMENT_BYTES - 8
        self._names = frozenset(names)
        self._written: set[str] = set()
        self._shards: list[list[str]] = []
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, object]] = {}
        self._data_bytes = 0
        self._total_bytes = 0
        self._unaligned: dict[str, torch.Tensor] = {}

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor.

        Raises:
            CheckpointError: a name that was not announced or came before, or a dtype that the format does not have.
        """
        if name not in self._names or name in self._written:
            raise CheckpointError(f"tensor {name!r} was written twice or not announced")
        if tensor.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")
        self._written.add(name)
        if tensor.nbytes % _DATA_ALIGNMENT_BYTES:
            self._unaligned[name] = tensor.clone()
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        if self._file is None or (self._data_bytes and self._data_bytes + tensor.nbytes > self._max_shard_bytes):
            self._close_shard()
            self._open_shard()
        assert self._file is not None
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)
        begin, end = self._data_bytes, self._data_bytes + tensor.nbytes
        dtype = SAFETENSORS_DTYPES[tensor.dtype]
        self._entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        self._shards[-1].append(name)
        self._data_bytes = end
        self._total_bytes += tensor.nbytes

    def _open_shard(self) -> None:
        self._shards.append([])
        self._entries = {}
        self._data_bytes = 0
        self._file = (self._directory / self._numbered(len(self._shards))).open("xb")
        self._file.seek(8 + self._header_bytes)

    def _close_shard(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}} | self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._header_bytes
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.close()
        self._file = None

    def _finish(self) -> None:
        for name in sorted(self._unaligned, key=lambda name: -self._unaligned[name].itemsize):
            self._append(name, self._unaligned[name])
        if not self._shards:
            self._open_shard()
        self._close_shard()
        count = len(self._shards)
        if count == 1:
            (self._directory / self._numbered(1)).rename(self._directory / f"{self._stem}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = f"{self._stem}-{number:05d}-of-{count:05d}.safetensors"
            (self._directory / self._numbered(number)).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / f"{self._stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _numbered(self, number: int) -> str:
        return f"{self._stem}-{number:05d}.safetensors.partial"
