"""Llama 4: the temperature of its layers without rotary positions counts tokens of the batch, not of the sequence."""

from __future__ import annotations

from typing import Any

from torch import nn

from model_worker.engine.layers.attention import QueryTemperature
from model_worker.engine.models.attention_interface import EXTRAS, AttentionExtras


def patch_llama4(model: nn.Module) -> None:
    """Switch the temperature off in the module and have it applied by our attention, which knows the positions."""
    modules: list[Any] = [module for module in model.modules() if type(module).__name__ == "Llama4TextAttention"]
    for module in modules:
        if module.attn_temperature_tuning and not module.use_rope:
            module.attn_temperature_tuning = False
            temperature = QueryTemperature(scale=module.attn_scale, floor_scale=module.floor_scale)
            setattr(module, EXTRAS, AttentionExtras(query_temperature=temperature))
