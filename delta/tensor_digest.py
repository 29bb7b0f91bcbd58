"""The digest of one tensor in memory, by the definition of `registry.digest`."""

from __future__ import annotations

import torch

from compression.safetensors_writer import SAFETENSORS_DTYPES
from registry.digest import tensor_hasher
from registry.errors import CheckpointError


def tensor_digest(tensor: torch.Tensor) -> str:
    """64 hex digits; raises CheckpointError for a dtype that safetensors does not have."""
    if tensor.dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"tensors of type {tensor.dtype} have no digest; convert the checkpoint to safetensors")
    hasher = tensor_hasher(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape))
    hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
