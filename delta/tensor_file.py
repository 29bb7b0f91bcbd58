"""Read single tensors of a safetensors file into memory of their own.

Read, not mapped: touching a mapped file that has been cut short in the meantime would end the process.
"""

from __future__ import annotations

from io import FileIO

import torch

from compression.safetensors_writer import SAFETENSORS_DTYPES
from delta.scratch import Scratch
from registry.errors import CheckpointError
from registry.tensor_header import TensorHeader

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


def read_tensor(opened: FileIO, header: TensorHeader, scratch: Scratch | None = None) -> torch.Tensor:
    """The tensor that `header` describes, from its file.

    Args:
        scratch: where it is read to; None: memory of its own.

    Raises:
        CheckpointError: of a dtype that torch does not have, or the file became shorter or unreadable.
    """
    if header.dtype not in _DTYPES:
        raise CheckpointError(f"{header.file}: tensor {header.name!r} is of type {header.dtype}, which is unknown here")
    empty = torch.empty if scratch is None else scratch.empty
    tensor = empty(header.shape, dtype=_DTYPES[header.dtype])
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        opened.seek(header.offset_bytes)
        while data:
            num_read = opened.readinto(data)
            if not num_read:
                raise CheckpointError(f"{header.file} was cut short while it was read; copy it again")
            data = data[num_read:]
    except OSError as error:
        raise CheckpointError(f"{header.file} cannot be read ({error.strerror}); copy it again") from error
    return tensor
