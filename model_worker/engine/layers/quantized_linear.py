"""Linear layers whose weights are quantized: of 4 or 8 bits in groups, or float8."""

from __future__ import annotations

from torch import Tensor

from model_worker.engine.layers.linear import Linear
from model_worker.engine.ops.quantized_matmul.functional import QuantizedWeight, quantized_matmul
from model_worker.engine.ops.quantized_matmul.tiles import tiles_for
from model_worker.engine.ops.tuning.tuned_table import table_of


class QuantizedMethod:
    """A `LinearMethod`. The plain weight is given up: there is only one copy.

    Args:
        layer: `layer.weight` is None afterwards.
        weight: in its place, on the layer's device.
    """

    def __init__(self, layer: Linear, weight: QuantizedWeight) -> None:
        assert (weight.num_outputs, weight.num_inputs) == (layer.out_features, layer.in_features)
        assert layer.weight is not None
        self.quantized = weight
        self._tiles = tiles_for(weight, table_of(layer.weight.device))
        self._dtype = layer.weight.dtype
        layer.weight = None

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        y = quantized_matmul(x.reshape(-1, x.shape[-1]), self.quantized, bias, self._tiles)
        return y.view(*x.shape[:-1], layer.out_features)

    def weight(self, layer: Linear) -> Tensor:
        """In the dtype that the layer's weight had; made anew in each call."""
        return self.quantized.dequantize().to(self._dtype)
