"""What --quantization means for a checkpoint, and what the weights then take."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from adapters.quantization import WeightPrecision, resolve_precision
from registry.checkpoint import Checkpoint, TensorHeader
from registry.errors import InvalidRequestError

ALL = frozenset({"Q8_0", "Q4_0", "Q4_1"})
FOUR_BITS = frozenset({"Q4_0", "Q4_1"})


def _checkpoint(format: str, *tensors: TensorHeader) -> Checkpoint:
    return Checkpoint(Path("m"), format, (), MappingProxyType({tensor.name: tensor for tensor in tensors}), {})


def _header(name: str, dtype: str, *shape: int) -> TensorHeader:
    return TensorHeader(name, Path("f"), dtype, shape, 0, 1)


@pytest.mark.parametrize(
    ("quantization", "is_native", "of_gguf", "of_safetensors"),
    [
        ("auto", True, (None, ALL), (None, frozenset())),
        ("auto", False, (None, frozenset()), (None, frozenset())),
        ("none", True, (None, frozenset()), (None, frozenset())),
        ("int8", True, ("int8", ALL), ("int8", frozenset())),
        ("int4", True, ("int4", FOUR_BITS), ("int4", frozenset())),
        ("fp8", True, ("fp8", ALL), ("fp8", frozenset())),
    ],
)
def test_what_it_means(
    quantization: str,
    is_native: bool,
    of_gguf: tuple[str | None, frozenset[str]],
    of_safetensors: tuple[str | None, frozenset[str]],
) -> None:
    for format, (rounded_to, kept_types) in (("gguf", of_gguf), ("safetensors", of_safetensors)):
        precision = resolve_precision(quantization, _checkpoint(format), is_native=is_native, has_deltas=False)
        assert precision == WeightPrecision(rounded_to, kept_types)


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4"])
def test_nothing_is_kept_where_deltas_are_added(quantization: str) -> None:
    precision = resolve_precision(quantization, _checkpoint("gguf"), is_native=True, has_deltas=True)
    assert precision.kept_types == frozenset()


def test_another_name() -> None:
    with pytest.raises(InvalidRequestError, match="auto, none, int8, int4, fp8, not 'int3'"):
        resolve_precision("int3", _checkpoint("safetensors"), is_native=True, has_deltas=False)


@pytest.mark.parametrize(
    ("precision", "tensor", "num_bytes"),
    [
        (WeightPrecision(), _header("a.weight", "F32", 10, 64), 640 * 2),
        (WeightPrecision("int8"), _header("a.weight", "F32", 10, 64), 20 * 34),
        (WeightPrecision("int4"), _header("a.weight", "F32", 10, 64), 20 * 20),
        (WeightPrecision("int4"), _header("model.embed_tokens.weight", "F32", 10, 64), 20 * 34),
        (WeightPrecision("int4"), _header("lm_head.weight", "BF16", 10, 64), 20 * 34),
        (WeightPrecision("int4"), _header("token_embd.weight", "F16", 10, 64), 20 * 34),
        (WeightPrecision("int4"), _header("output.weight", "F16", 10, 64), 20 * 34),
        (WeightPrecision("int4"), _header("blk.0.attn_output.weight", "F16", 10, 64), 20 * 20),
        (WeightPrecision("int4"), _header("model.norm.weight", "F32", 64), 64 * 2),
        (WeightPrecision("int8"), _header("rows.of.48", "F32", 10, 48), 480 * 2),
        (WeightPrecision("int4"), _header("model.layers.0.mlp.experts.gate_up_proj", "BF16", 4, 10, 64), 80 * 20),
        (WeightPrecision("int4"), _header("model.layers.0.mlp.experts.down_proj", "BF16", 4, 10, 48), 4 * 480 * 2),
        (WeightPrecision(None, ALL), _header("a.weight", "Q8_0", 10, 64), 20 * 34),
        (WeightPrecision(None, ALL), _header("a.weight", "Q4_0", 10, 64), 20 * 20),
        (WeightPrecision(None, ALL), _header("a.weight", "Q4_K", 1, 256), 256 * 2),
        (WeightPrecision("int8", ALL), _header("a.weight", "Q4_1", 10, 64), 20 * 20),
        (WeightPrecision("int4", FOUR_BITS), _header("a.weight", "Q8_0", 10, 64), 20 * 20),
    ],
)
def test_bytes_of_a_tensor(precision: WeightPrecision, tensor: TensorHeader, num_bytes: int) -> None:
    assert precision.num_bytes(tensor, 2) == num_bytes


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        (WeightPrecision(), "Q4_1, Q8_0 dequantized"),
        (WeightPrecision("int8"), "int8 (Q4_1, Q8_0 dequantized first)"),
        (WeightPrecision(None, ALL), "Q4_1, Q8_0 as the file has them"),
        (WeightPrecision("int4", FOUR_BITS), "int4 (Q8_0 dequantized first); Q4_1 as the file has them"),
    ],
)
def test_what_people_read(precision: WeightPrecision, text: str) -> None:
    tensors = (_header("a", "Q4_1", 1, 32), _header("b", "Q8_0", 1, 32), _header("c", "F32", 32))
    assert precision.describe(_checkpoint("gguf", *tensors)) == text


def test_where_nothing_was_quantized() -> None:
    checkpoint = _checkpoint("safetensors", _header("a", "BF16", 1, 32))
    assert WeightPrecision().describe(checkpoint) == "none"
    assert WeightPrecision("int8").describe(checkpoint) == "int8"
