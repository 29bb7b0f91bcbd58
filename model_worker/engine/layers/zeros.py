"""Memory for KV caches: zeros that are not written before they are used."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False) -> Tensor:
    """Zeros whose memory, on CPUs, is taken from the system page by page when it is first written.

    torch.zeros writes every page at once: seconds for a large cache of which most may never be used. Pinned memory is
    copied to and from a GPU several times faster, but is taken at once.
    """
    if pinned:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


def torch_dtype(name: str) -> torch.dtype:
    """The type of a name such as "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
