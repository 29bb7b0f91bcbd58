"""The one linear layer of every model, and the ways in which it can be computed.

    y = x W^T + b        x [..., in], W [out, in], b [out]

A model's own linear classes are replaced by `Linear` when it is built. How the product is computed is the layer's
`method`, chosen after the weights are there. For a step in which rows use variants, another method takes its place
(`layers/variants.py`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PACK_ROWS = 32  # rows that the packed layout is chosen for; measured: it serves 1 to 512 rows about as well


class LinearMethod(Protocol):
    """Computes the product of one layer."""

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in], bias [out] -> [..., out]"""
        ...

    def weight(self, layer: Linear) -> Tensor:
        """What the product is made with. -> [out, in]"""
        ...


class DenseMethod:
    """torch's own product over the weight as it is."""

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight(layer), bias)

    def weight(self, layer: Linear) -> Tensor:
        assert layer.weight is not None
        return layer.weight


class OneDnnMethod(DenseMethod):
    """oneDNN over the weight as it is, for weights that are shared with an embedding and cannot be packed."""

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn_linear(x, layer.weight, bias)


class PackedMethod:
    """oneDNN over a weight in oneDNN's own blocked layout. The plain weight is given up: there is only one copy.

    Args:
        layer: its weight is taken; `layer.weight` is None afterwards.
    """

    def __init__(self, layer: Linear) -> None:
        assert layer.weight is not None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _PACK_ROWS)
        layer.weight = None

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn_linear(x, self.packed, bias)

    def weight(self, layer: Linear) -> Tensor:
        plain: Tensor = self.packed.to_dense()
        return plain


class Linear(nn.Module):
    """Replaces nn.Linear and transformers' Conv1D.

    Attributes:
        in_features, out_features: of the product, whatever form the weight has.
        weight: [out, in]; None once a method keeps it in another form.
        bias: [out] or None.
        stored_transposed: checkpoints hold the weight as [in, out] (Conv1D).
        method: how the product is computed.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        stored_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.stored_transposed = stored_transposed
        self.method: LinearMethod = DenseMethod()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {type(self.method).__name__}"


def choose_method(layer: Linear, *, shared_weight: bool) -> LinearMethod:
    """The fastest way that was measured for a layer whose weights are loaded (benchmarks/LOG.md).

    Args:
        shared_weight: the weight is also an embedding's, so that it must stay as it is.
    """
    weight = layer.weight
    assert weight is not None
    if weight.device.type != "cpu" or not _onednn_knows(weight.dtype):
        return DenseMethod()
    return OneDnnMethod() if shared_weight else PackedMethod(layer)


def _onednn_knows(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _onednn_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out
