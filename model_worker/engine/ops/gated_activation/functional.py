"""The activation of a gate, times what it lets through.

out = round(round(activation(gate)) * up)           gate, up = x[:, :I], x[:, I:]

    silu(z)        z * sigmoid(z)
    gelu_tanh(z)   z * sigmoid(1.5957691 (z + 0.044715 z^3))

    x      [T, 2 I] bfloat16, float16 or float32, rows contiguous
    out    [T, I] of x's dtype; computed in float32, rounded where transformers rounds
"""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.gated_activation.reference import gated_activation_reference
from model_worker.engine.ops.linear import Activation

__all__ = ["gated_activation"]


def gated_activation(x: Tensor, activation: Activation) -> Tensor:
    """See the module's docstring. A new tensor."""
    assert activation is not Activation.NONE
    assert x.ndim == 2
    assert x.shape[1] % 2 == 0
    assert x.stride(1) == 1
    if x.device.type == "cuda":
        from model_worker.engine.ops.gated_activation import triton  # not installed where there is no GPU

        out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
        triton.gated_activation(x, activation, out)
        return out
    return gated_activation_reference(x, activation)
