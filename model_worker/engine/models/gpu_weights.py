"""The GPU decoder's weights: each part of a checkpoint goes to its place in a tensor of the device, and nowhere else.

    checkpoint                                place
    q_proj, k_proj, v_proj .weight            rows of layers.i.self_attn.qkv_proj.weight, one part after another
    q_norm, k_norm .weight, a head each       repeated for the heads of layers.i.self_attn.qk_norms.0.weight
    embed_tokens.weight                       embed_tokens.weight; a tied head has the same tensor, unless quantized
    experts.gate_up_proj, experts.down_proj   the same of layers.i.mlp, [E, N, K]; never quantized or kept in blocks

Memory for a tensor is taken when its first part comes. A matrix that is to be quantized is quantized on the device as
soon as it is complete; blocks of a GGUF file stay as they are, where all parts of a matrix have them. Beside the model
there is never more than one matrix in another form, and what is being read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compression.grouped_weight import GroupedWeight, can_quantize
from compression.int4 import quantize_int4
from compression.int8 import quantize_int8
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.quantized_linear import QuantizedMethod
from model_worker.engine.ops.quantized_matmul.functional import QuantizedWeight, pack_groups, quantize_float8
from registry.errors import ClientError


@dataclass(frozen=True, slots=True, eq=False)
class WeightPlace:
    """Where a tensor of the checkpoint goes.

    Attributes:
        module, attribute: the parameter; as long as nothing of it is there, it is on meta.
        part: which part of the module it is.
        first, num_rows: the rows of the parameter, before they are repeated; of experts, all of these.
        repeats: the tensor comes so many times, one after another.
        offset: added to it.
    """

    module: nn.Module
    attribute: str
    part: int
    first: int
    num_rows: int
    repeats: int = 1
    offset: float = 0.0

    @property
    def linear(self) -> FusedLinear | None:
        """Whose matrix it is a part of, if it is."""
        return self.module if isinstance(self.module, FusedLinear) and self.attribute == "weight" else None

    @property
    def parameter(self) -> Tensor:
        parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, Tensor)
        return parameter

    @property
    def rows(self) -> Tensor:
        """Of the parameter, or of what a quantized one stands for."""
        layer = self.linear
        whole = self.parameter if layer is None else layer.method.weight(layer)
        return whole[self.first : self.first + self.num_rows * self.repeats]

    def converted(self, tensor: Tensor) -> Tensor:
        """What the place holds of a tensor of the checkpoint; on the tensor's device."""
        if self.offset:
            tensor = tensor.float() + self.offset
        return tensor.repeat(self.repeats) if self.repeats > 1 else tensor


class GpuWeights:
    """Fills a decoder.

    Args:
        places: by the name in the checkpoint.
        device: of all weights.
        quantization: int8, int4, fp8, or None: as the checkpoint has them. The head is never of 4 bits.
        head: of the decoder.
    """

    def __init__(
        self,
        places: Mapping[str, WeightPlace],
        device: torch.device,
        *,
        quantization: str | None,
        head: FusedLinear,
    ) -> None:
        self._places = places
        self._device = device
        self._quantization = quantization
        self._head = head
        self._num_missing = Counter((place.module, place.attribute) for place in places.values())
        self._blocks: dict[FusedLinear, dict[str, GroupedWeight]] = {}  # of what is not complete

    def put(self, name: str, tensor: Tensor | GroupedWeight) -> None:
        """Take a tensor of the checkpoint; from pinned memory without waiting for the copy."""
        place = self._places[name]
        layer = place.linear
        if isinstance(tensor, Tensor):
            self._copy(place, tensor)
        elif layer is not None:
            self._blocks.setdefault(layer, {})[name] = tensor
        else:
            self._copy(place, tensor.dequantize())
        key = (place.module, place.attribute)
        self._num_missing[key] -= 1
        if layer is not None and self._num_missing[key] == 0:
            self._complete(layer)

    def put_expert(self, name: str, index: int, half: int | None, tensor: Tensor | GroupedWeight) -> None:
        """Take one expert's matrix, or its gate (half 0) or up projection (half 1)."""
        place = self._places[name]
        self._take_memory(place)
        matrix = place.parameter[index]
        dense = tensor if isinstance(tensor, Tensor) else tensor.dequantize()
        (matrix if half is None else matrix.chunk(2)[half]).copy_(dense, non_blocking=True)

    def tie_head(self, embedding: nn.Embedding) -> None:
        """Make the head of the embedding, whose weights are there."""
        self._head.weight = nn.Parameter(embedding.weight, requires_grad=False)
        self._quantize(self._head)

    def holds(self, name: str, tensor: Tensor | GroupedWeight) -> bool:
        """Whether the filled rows, of a matrix that is not quantized, are what this tensor makes of them."""
        place = self._places[name]
        dense = tensor.dequantize() if isinstance(tensor, GroupedWeight) else tensor
        return torch.equal(place.converted(dense).to(self._device, place.rows.dtype), place.rows)

    def get(self, name: str) -> Tensor:
        """What is computed with in place of a matrix or bias of the checkpoint. -> [N, K] or [N], on the device"""
        return self._places[name].rows

    def _copy(self, place: WeightPlace, tensor: Tensor) -> None:
        self._take_memory(place)
        assert len(tensor) == place.num_rows
        rows = place.parameter[place.first : place.first + place.num_rows * place.repeats]
        rows.copy_(place.converted(tensor), non_blocking=True)

    def _take_memory(self, place: WeightPlace) -> None:
        if place.parameter.device.type == "meta":
            memory = torch.empty_like(place.parameter, device=self._device)
            setattr(place.module, place.attribute, nn.Parameter(memory, requires_grad=False))

    def _complete(self, layer: FusedLinear) -> None:
        """All parts of a matrix are there."""
        blocks = self._blocks.pop(layer, {})
        forms = {weight.minimums is None for weight in blocks.values()}
        if len(blocks) == len(layer.widths) and len(forms) == 1:
            self._use(
                layer, pack_groups(_joined([blocks[name] for name in sorted(blocks, key=self._first)]), self._device)
            )
            return
        for name, weight in blocks.items():  # a file may keep one part of a matrix in a type of its own
            self._copy(self._places[name], weight.dequantize())
        self._quantize(layer)

    def _first(self, name: str) -> int:
        return self._places[name].first

    def _quantize(self, layer: FusedLinear) -> None:
        weight = layer.weight
        assert weight is not None
        kind = self._quantization
        if kind is None or not can_quantize(weight.shape):
            return
        try:
            if kind == "fp8":
                self._use(layer, quantize_float8(weight))
            elif kind == "int8" or layer is self._head:
                self._use(layer, pack_groups(quantize_int8(weight)))
            else:
                self._use(layer, pack_groups(quantize_int4(weight)))
        except ClientError as error:
            raise type(error)(f"{layer.key}: {error.message}") from error

    def _use(self, layer: FusedLinear, weight: QuantizedWeight) -> None:
        layer.method = QuantizedMethod(layer, weight)


def _joined(parts: list[GroupedWeight]) -> GroupedWeight:
    minimums = [part.minimums for part in parts if part.minimums is not None]
    return GroupedWeight(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(minimums) if minimums else None,
    )
