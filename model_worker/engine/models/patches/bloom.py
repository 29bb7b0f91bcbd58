"""BLOOM: its attention module computes attention itself, with linear biases."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from model_worker.engine.models.attention_interface import EXTRAS, AttentionExtras, attention_forward
from model_worker.engine.models.patches.alibi import alibi_slopes
from model_worker.engine.ops.paged_attention import Alibi


def patch_bloom(model: nn.Module) -> None:
    """Let each BloomAttention call our attention; scores are q . k / sqrt(D) + slope * position."""
    modules: list[Any] = [module for module in model.modules() if type(module).__name__ == "BloomAttention"]
    alibi = Alibi(alibi_slopes(modules[0].num_heads))
    for module in modules:
        setattr(module, EXTRAS, AttentionExtras(alibi=alibi))
        module.forward = partial(_forward, module)


def _forward(module: Any, hidden_states: Tensor, residual: Tensor, **unused: Any) -> tuple[Tensor, None]:
    """hidden_states, residual [1, T, hidden] -> ([1, T, hidden], None)"""
    num_tokens = hidden_states.shape[1]
    fused = module.query_key_value(hidden_states).view(1, num_tokens, module.num_heads, 3, module.head_dim)
    query, key, value = (fused[..., part, :].transpose(1, 2) for part in range(3))  # [1, H, T, D]
    out, _ = attention_forward(module, query, key, value, None, scaling=module.inv_norm_factor)
    return residual + module.dense(out.flatten(2)), None
