"""`lossless`: the bits that changed, compressed."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delta.codecs.codec import Parts
from delta.codecs.part_checks import check_names

_LEVEL = 3


class Lossless:
    """W' xor W as bits. A `WholeCodec`.

    Parts: frame [n] uint8: one zstd frame (RFC 8878) with its content size and checksum, of the bytes of the xor: first
    the lowest byte of every number, then the next of every number, and so on, since the upper ones hardly change. W is
    cast to the dtype of W' before, and 0 where the base has no such tensor.
    """

    name = "lossless"

    def encode(self, base: Tensor | None, target: Tensor) -> Parts:
        changed = _bytes(target)
        if base is not None:
            changed = changed ^ _bytes(base.to(target.dtype))
        planes = np.ascontiguousarray(changed.T)
        frame = _zstandard().ZstdCompressor(level=_LEVEL, write_checksum=True).compress(planes.data)
        return {"frame": torch.frombuffer(bytearray(frame), dtype=torch.uint8)}

    def check(self, parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        check_names(parts, "frame")
        frame, zstandard = parts["frame"], _zstandard()
        if frame.dtype != torch.uint8 or frame.ndim != 1:
            raise ValueError("frame is not a row of bytes")
        try:
            size = zstandard.frame_content_size(frame[:18].numpy().tobytes())  # the longest header
        except zstandard.ZstdError as error:
            raise ValueError(f"frame is no zstd frame ({error})") from error
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"frame holds {size} bytes, not those of a tensor {list(shape)} of {dtype}")

    def decode(self, base: Tensor | None, parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        self.check(parts, dtype, shape)
        zstandard = _zstandard()
        try:
            planes = zstandard.ZstdDecompressor().decompress(parts["frame"].numpy().data, read_across_frames=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"frame is damaged ({error})") from error
        changed = np.frombuffer(planes, dtype=np.uint8).reshape(dtype.itemsize, -1).T
        target = changed if base is None else changed ^ _bytes(base.to(dtype))
        return torch.from_numpy(np.array(target, order="C").reshape(-1)).view(dtype).reshape(shape)


LOSSLESS = Lossless()


def _zstandard() -> Any:
    """Imported when a delta of this codec is read or made: the engine runs where it is not installed."""
    return importlib.import_module("zstandard")


def _bytes(tensor: Tensor) -> np.ndarray:
    """[numel, bytes of a number] uint8, the lowest byte first"""
    flat = tensor.contiguous().reshape(-1)
    array: np.ndarray = flat.view(torch.uint8).numpy().reshape(len(flat), tensor.itemsize)
    return array
