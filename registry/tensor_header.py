"""What a checkpoint's header says about one tensor, whatever the file format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as a checkpoint file declares it; nothing of its data is read.

    Attributes:
        name: the tensor's name in the file.
        file: the file that holds the data.
        dtype: the safetensors spelling ("F32", "BF16", "I8", ...) or the GGUF type ("Q4_1", "Q6_K", ...).
        shape: torch order, row-major: `[out, in]` for a linear weight. GGUF's reversed order is undone.
        offset_bytes: where the data begins, counted from the start of the file.
        num_bytes: size of the data.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int
