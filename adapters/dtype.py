"""Which floating-point type the weights and the KV cache have in memory."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from registry.checkpoint import Checkpoint
from registry.errors import InvalidRequestError

DTYPES = ("float32", "bfloat16", "float16")
_HEADER_DTYPES = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

log = logging.getLogger(__name__)


def stored_dtype(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str:
    """The type that most of the checkpoint's values have; quantized blocks count as bfloat16, their usual origin."""
    if checkpoint.tensors:
        num_bytes: Counter[str] = Counter()
        for tensor in checkpoint.tensors.values():
            num_bytes[_HEADER_DTYPES.get(tensor.dtype, "bfloat16")] += tensor.num_bytes
        return num_bytes.most_common(1)[0][0]
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return named if named in DTYPES else "float32"


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's bf16 extension)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def resolve_dtype(dtype: str, stored: str, *, native_bf16: bool | None) -> str:
    """`dtype`, with "auto" decided: the checkpoint's own, or float32 on a CPU where half precision is emulated.

    Raises: InvalidRequestError for a name that is none of auto, float32, bfloat16, float16.
    """
    if dtype in DTYPES:
        return dtype
    if dtype != "auto":
        raise InvalidRequestError(f"dtype is one of auto, {', '.join(DTYPES)}, not {dtype!r}", param="dtype")
    if stored != "float32" and not (has_native_bf16() if native_bf16 is None else native_bf16):
        log.info(
            "the checkpoint is %s, but this CPU has no bfloat16 instructions: computing in float32, which is several "
            "times faster here and needs twice the memory; --dtype %s overrides this",
            stored,
            stored,
        )
        return "float32"
    return stored
