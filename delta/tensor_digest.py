"""The digest of one tensor and of a set of tensors: the identity of a base model, whatever files hold it.

tensor digest = SHA-256( dtype " " shape " " bytes )       shape as "[4096,1024]", dtype as safetensors spells it
set digest    = SHA-256( for each name in order: name NUL tensor digest in hex LF )
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from compression.safetensors_writer import SAFETENSORS_DTYPES
from registry.errors import CheckpointError


def tensor_digest(tensor: torch.Tensor) -> str:
    """64 hex digits."""
    if tensor.dtype not in SAFETENSORS_DTYPES:
        raise CheckpointError(f"tensors of type {tensor.dtype} cannot be digested")
    shape = ",".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{SAFETENSORS_DTYPES[tensor.dtype]} [{shape}] ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensors_digest(digests: Mapping[str, str]) -> str:
    """`sha256:` and 64 hex digits, from the tensors' digests by name; independent of files and their order."""
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(f"{name}\0{digests[name]}\n".encode())
    return f"sha256:{total.hexdigest()}"
