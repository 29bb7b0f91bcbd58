"""Families whose modeling code needs a hand before our attention is right for them.

A patch is a function that takes the model while it has no weights yet and changes its attention modules. Each has a
parity test against transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from model_worker.engine.models.patches.bloom import patch_bloom
from model_worker.engine.models.patches.falcon import patch_falcon
from model_worker.engine.models.patches.llama4 import patch_llama4

PATCHES: Mapping[str, Callable[[nn.Module], None]] = MappingProxyType(
    {"bloom": patch_bloom, "falcon": patch_falcon, "llama4_text": patch_llama4}
)
