"""The precisions that benchmarks compare, by name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

PRECISIONS: Mapping[str, tuple[str, str]] = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "float16": ("float16", "none"),
    "int8": ("auto", "int8"),
    "int4": ("auto", "int4"),
    "stored": ("auto", "auto"),
}
"""Precision -> --dtype and --quantization."""


def precision_names(text: str) -> list[str]:
    """The `type` of an argument NAME,..."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(PRECISIONS)}")
    return names
