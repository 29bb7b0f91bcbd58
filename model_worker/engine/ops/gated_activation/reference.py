"""Gated activations in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from model_worker.engine.ops.linear import Activation


def gated_activation_reference(x: Tensor, activation: Activation) -> Tensor:
    """x [T, 2 I] -> [T, I]"""
    gate, up = x.chunk(2, dim=1)
    return (F.silu(gate) if activation is Activation.SILU else F.gelu(gate, approximate="tanh")) * up
