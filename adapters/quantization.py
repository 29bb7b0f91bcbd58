"""Which weights are kept in 8 or 4 bits: what may be asked for, what it means for a checkpoint, what it takes.

auto    blocks of a GGUF file stay as the file has them, where the engine computes with such blocks
none    everything in --dtype
int8    matrices in 8 bits; blocks of 8 and of 4 bits stay as they are
int4    matrices in 4 bits, but embedding and head in 8; blocks of 4 bits stay as they are
fp8     matrices in float8_e4m3fn, on GPUs only; blocks of 8 and of 4 bits stay as they are

On GPUs the embedding stays in --dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from compression.gguf import GROUPED_TYPES
from compression.grouped_weight import GROUP, can_quantize
from registry.checkpoint import Checkpoint, TensorHeader
from registry.errors import InvalidRequestError
from registry.ggml_types import GGML_TYPES

QUANTIZATIONS = ("auto", "none", "int8", "int4", "fp8")
GROUP_BYTES: Mapping[str, int] = {"int8": GROUP + 2, "int4": GROUP // 2 + 4, "fp8": GROUP}
"""Of 32 weights: their numbers, a float16 scale, and for int4 a float16 minimum; fp8 has a scale for each output."""

_BLOCK_TYPES = frozenset(kind.name for kind in GGML_TYPES.values() if kind.block_size > 1)
_FOUR_BIT_TYPES = frozenset({"Q4_0", "Q4_1"})
# 4 bits cost the embedding and the head more than any other matrix (docs/formats/quantized.md).
_EMBEDDING_OR_HEAD = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.weight|(token_embd|output)\.weight")


@dataclass(frozen=True, slots=True)
class WeightPrecision:
    """How the weights of one model are kept.

    Attributes:
        quantization: "int8", "int4" or "fp8": what matrices are rounded to while loading; None: not rounded.
        kept_types: GGUF types whose blocks stay as they are.
    """

    quantization: str | None = None
    kept_types: frozenset[str] = frozenset()

    def num_bytes(self, tensor: TensorHeader, value_bytes: int) -> int:
        """What a tensor takes in memory; `value_bytes` is the size of a value that is not quantized."""
        num_values = math.prod(tensor.shape)
        if not can_quantize(tensor.shape[-2:]):  # of three dimensions: the matrices of all experts
            return num_values * value_bytes
        if tensor.dtype in self.kept_types:
            kind = "int4" if tensor.dtype in _FOUR_BIT_TYPES else "int8"
        elif self.quantization is not None:
            is_wide = self.quantization == "int4" and _EMBEDDING_OR_HEAD.fullmatch(tensor.name)
            kind = "int8" if is_wide else self.quantization
        else:
            return num_values * value_bytes
        return num_values // GROUP * GROUP_BYTES[kind]

    def describe(self, checkpoint: Checkpoint) -> str:
        """For people; "none": nothing is quantized, here or in the files."""
        stored = {tensor.dtype for tensor in checkpoint.tensors.values()} & _BLOCK_TYPES
        kept, others = (", ".join(sorted(types)) for types in (stored & self.kept_types, stored - self.kept_types))
        parts = []
        if self.quantization is not None:
            parts.append(f"{self.quantization} ({others} dequantized first)" if others else self.quantization)
        elif others:
            parts.append(f"{others} dequantized")
        if kept:
            parts.append(f"{kept} as the file has them")
        return "; ".join(parts) or "none"


def resolve_precision(
    quantization: str, checkpoint: Checkpoint, *, is_native: bool, has_deltas: bool
) -> WeightPrecision:
    """What `quantization` means for a checkpoint.

    Args:
        quantization: of `QUANTIZATIONS`.
        is_native: the engine will compute this model with quantized weights if they are.
        has_deltas: deltas are added to the weights, which have to be numbers for that.

    Raises: InvalidRequestError for another name.
    """
    if quantization not in QUANTIZATIONS:
        raise InvalidRequestError(
            f"quantization is one of {', '.join(QUANTIZATIONS)}, not {quantization!r}", param="quantization"
        )
    types = GROUPED_TYPES if checkpoint.format == "gguf" and not has_deltas else frozenset()
    if quantization in ("int8", "fp8"):
        return WeightPrecision(quantization, types)
    if quantization == "int4":
        return WeightPrecision("int4", types & _FOUR_BIT_TYPES)
    return WeightPrecision(None, types if quantization == "auto" and is_native else frozenset())
