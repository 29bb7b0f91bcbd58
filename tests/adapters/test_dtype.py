"""The checkpoint's own type, from its headers or its config."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from adapters.dtype import has_native_bf16, resolve_dtype, stored_dtype
from registry.checkpoint import Checkpoint, TensorHeader


def checkpoint(**num_bytes: int) -> Checkpoint:
    headers = {name: TensorHeader(name, Path("f"), name, (1,), 0, size) for name, size in num_bytes.items()}
    return Checkpoint(Path("m"), "safetensors", (), MappingProxyType(headers), {})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"F32": 10, "BF16": 20}, "bfloat16"),
        ({"F32": 30, "BF16": 20}, "float32"),
        ({"F16": 10}, "float16"),
        ({"Q4_1": 10, "F32": 5}, "bfloat16"),
    ],
)
def test_most_bytes_decide(sizes, expected) -> None:
    assert stored_dtype(checkpoint(**sizes), {"dtype": "float64"}) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, "float32"), ({"torch_dtype": "float16"}, "float16"), ({"dtype": "torch.bfloat16"}, "bfloat16")],
)
def test_the_config_decides_where_there_are_no_headers(config, expected) -> None:
    assert stored_dtype(checkpoint(), config) == expected


def test_auto_keeps_float32_whatever_the_cpu() -> None:
    assert resolve_dtype("auto", "float32", native_bf16=True) == "float32"
    asked = resolve_dtype("auto", "float16", native_bf16=None)
    assert asked == ("float16" if has_native_bf16() else "float32")
