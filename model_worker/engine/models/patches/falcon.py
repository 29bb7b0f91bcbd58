"""Falcon: its attention module computes attention itself, with rotary positions or linear biases.

Three layouts of the fused projection (D-wide columns):

    new_decoder_architecture    for each KV head: its query heads, key, value
    multi_query                 all query heads, one key, one value
    neither                     for each head: query, key, value
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from model_worker.engine.models.attention_interface import EXTRAS, AttentionExtras, attention_forward
from model_worker.engine.models.patches.alibi import alibi_slopes
from model_worker.engine.ops.paged_attention import Alibi

_ROTATE: Callable[..., tuple[Tensor, Tensor]] = apply_rotary_pos_emb


def patch_falcon(model: nn.Module) -> None:
    """Let each FalconAttention call our attention; with linear biases, scores are (q . k + slope * position) / sqrt(D).

    transformers rounds the slopes and their products with positions to bfloat16 whatever the model's dtype, as the
    model was trained.
    """
    modules: list[Any] = [module for module in model.modules() if type(module).__name__ == "FalconAttention"]
    first = modules[0]
    alibi = Alibi(alibi_slopes(first.num_heads).bfloat16(), first.inv_norm_factor) if first.config.alibi else None
    for module in modules:
        setattr(module, EXTRAS, AttentionExtras(alibi=alibi))
        module.forward = partial(_forward, module)


def _forward(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **unused: Any
) -> tuple[Tensor, None]:
    """hidden_states [1, T, hidden] -> ([1, T, hidden], None)"""
    query, key, value = _split(module, module.query_key_value(hidden_states))
    if not module.config.alibi:
        query, key = _ROTATE(query, key, *position_embeddings)
    out, _ = attention_forward(module, query, key, value, None, scaling=module.inv_norm_factor)
    return module.dense(out.flatten(2)), None


def _split(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, T, columns] -> query [1, H, T, D], key and value [1, Hkv, T, D]"""
    columns = fused.view(1, fused.shape[1], -1, module.head_dim)  # [1, T, H + 2 Hkv, D]
    if module.new_decoder_architecture:
        num_shared = module.num_heads // module.num_kv_heads
        by_group = columns.view(1, -1, module.num_kv_heads, num_shared + 2, module.head_dim)
        query = by_group[:, :, :, :-2].flatten(2, 3)
        key, value = by_group[:, :, :, -2], by_group[:, :, :, -1]
    elif module.multi_query:
        query, key, value = torch.split(columns, [module.num_heads, 1, 1], dim=2)
    else:
        query, key, value = columns.view(1, -1, module.num_heads, 3, module.head_dim).unbind(3)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
