"""The native decoder's weights: parts of a checkpoint become packed, fused and, where wanted, quantized matrices.

    checkpoint                                        here
    q_proj, k_proj, v_proj .weight                    layers.i.qkv          one packed weight, outputs one after another
    gate_proj, up_proj .weight                        layers.i.gate_up      one gated pair
    mlp.experts, each                                 layers.i.experts...   one packed weight after the other
    embed_tokens.weight (tied: lm_head.weight too)    embedding, head       once, for both
    norms, biases                                     float32 vectors

A matrix is packed as soon as its last part is there, so that beside the packed model there is never more than one
matrix in another form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compression.grouped_weight import GroupedWeight, can_quantize
from compression.int8 import quantize_int8
from model_worker.engine.models.decoder_fusions import Fusion
from model_worker.engine.ops.cpu.huge_pages import HugePageArena
from model_worker.engine.ops.cpu.program import Team
from model_worker.engine.ops.int4_grid import quantize_int4_natively
from model_worker.engine.ops.linear import PackedWeight, interleave_gated, pack, separate_gated
from registry.errors import ClientError

Quantizer = Callable[[Tensor], GroupedWeight]


class NativeWeights:
    """Fills fusions.

    Args:
        fusions: all that the model consists of.
        dtype: of matrices that are not quantized.
        quantization: int8, int4, or None: quantize nothing. Weights that come quantized stay as they are.
        wide_keys: matrices that lose too much in 4 bits, and are given 8.
        dense_keys: matrices that are not quantized.
        team: quantizes.

    Attributes:
        matrices, vectors: what is complete, by key.
    """

    def __init__(
        self,
        fusions: Sequence[Fusion],
        *,
        dtype: torch.dtype,
        quantization: str | None,
        wide_keys: frozenset[str],
        dense_keys: frozenset[str],
        team: Team,
    ) -> None:
        self.matrices: dict[str, PackedWeight] = {}
        self.vectors: dict[str, Tensor] = {}
        self._arena = HugePageArena()
        self._fusions = {name: fusion for fusion in fusions for name in fusion.names}
        self._parts: dict[str, dict[str | int, Tensor | GroupedWeight]] = {}  # of what is not complete, by key
        self._dtype = dtype
        self._quantization = quantization
        self._wide_keys = wide_keys
        self._dense_keys = dense_keys
        self._quantizers: dict[str, Quantizer] = {
            "int8": quantize_int8,
            "int4": partial(quantize_int4_natively, team=team),
        }

    @property
    def fused(self) -> dict[str, str]:
        """Parts of a checkpoint that become one with others: their names, to its key."""
        return {name: fusion.key for name, fusion in self._fusions.items() if len(fusion.names) > 1}

    def put(self, name: str, tensor: Tensor | GroupedWeight) -> None:
        """Take one tensor of the checkpoint."""
        fusion = self._fusions[name]
        if fusion.num_experts is not None:
            assert isinstance(tensor, Tensor)
            for index, matrix in enumerate(tensor):
                self.put_expert(name, index, None, matrix)
            return
        there = self._parts.setdefault(fusion.key, {})
        there[name] = tensor
        if len(there) < len(fusion.names):
            return
        del self._parts[fusion.key]
        parts = [there[part] for part in fusion.names]
        if len(parts[0].shape) == 1:
            self.vectors[fusion.key] = self._vector(fusion, parts)
        else:
            matrix = self._matrix(fusion, parts)
            self.matrices[fusion.key] = replace(matrix, data=self._arena.keep(matrix.data))

    def put_expert(self, name: str, index: int, half: int | None, tensor: Tensor | GroupedWeight) -> None:
        """Take one expert's matrix, or its gate (half 0) or up projection (half 1)."""
        fusion = self._fusions[name]
        if half is not None:
            there = self._parts.setdefault(fusion.key, {})
            other = there.pop(index, None)
            if other is None:
                there[index] = tensor
                return
            parts = [other, tensor] if half == 1 else [tensor, other]
        else:
            parts = [tensor]
        packed = self._matrix(fusion, parts)
        assert fusion.num_experts is not None
        whole = self.matrices.get(fusion.key)
        if whole is None:
            data = self._arena.empty(fusion.num_experts * packed.num_bytes)
            num_outputs = fusion.num_experts * packed.num_outputs
            whole = self.matrices[fusion.key] = PackedWeight(data, packed.format, num_outputs, packed.num_inputs)
        assert packed.format is whole.format
        whole.data[index * packed.num_bytes : (index + 1) * packed.num_bytes] = packed.data

    def holds(self, name: str, tensor: Tensor | GroupedWeight) -> bool:
        """Whether a complete matrix, made of this part alone, is what this tensor would make it."""
        fusion = self._fusions[name]
        assert fusion.names == (name,)
        return torch.equal(self.matrices[fusion.key].data, self._matrix(fusion, [tensor]).data)

    def unpack(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """What the kernels compute with in place of a matrix or bias of the checkpoint. -> [N, K] or [N] float32

        Args:
            sizes: N of each parameter.
        """
        fusion = self._fusions[name]
        matrix = self.matrices.get(fusion.key)
        whole = self.vectors[fusion.key] if matrix is None else matrix.unpack()
        if fusion.gated:
            whole = torch.cat(separate_gated(whole, sum(sizes[part] for part in fusion.names) // 2))
        start = sum(sizes[part] for part in fusion.names[: fusion.names.index(name)])
        return whole[start : start + sizes[name]]

    def unpack_expert(self, name: str, index: int, size: int) -> Tensor:
        """As `unpack`, of one expert of a parameter [E, size, K]. -> [size, K] float32"""
        fusion = self._fusions[name]
        assert fusion.num_experts is not None
        whole = self.matrices[fusion.key]
        num_bytes, num_outputs = whole.num_bytes // fusion.num_experts, whole.num_outputs // fusion.num_experts
        data = whole.data[index * num_bytes : (index + 1) * num_bytes]
        rows = replace(whole, data=data, num_outputs=num_outputs).unpack()
        return torch.cat(separate_gated(rows, size // 2)) if fusion.gated else rows

    def _vector(self, fusion: Fusion, parts: list[Tensor | GroupedWeight]) -> Tensor:
        vectors = [part.float() for part in parts if isinstance(part, Tensor)]
        assert len(vectors) == len(parts)
        if fusion.gated:
            return interleave_gated(*_gate_and_up(vectors)).clone()
        return torch.cat(vectors) + fusion.offset

    def _matrix(self, fusion: Fusion, parts: list[Tensor | GroupedWeight]) -> PackedWeight:
        prepared = [self._prepare(fusion.key, part) for part in parts]
        if len({_form(part) for part in prepared}) > 1:  # a file may keep one part of a fusion in a type of its own
            prepared = [self._prepare(fusion.key, _dequantized(part)) for part in prepared]
        grouped = [part for part in prepared if isinstance(part, GroupedWeight)]
        if len(grouped) < len(prepared):
            dense = [_dequantized(part).to(self._dtype) for part in prepared]
            return pack(_join(dense, gated=fusion.gated))
        minimums = [part.minimums for part in grouped if part.minimums is not None]
        return pack(
            GroupedWeight(
                _join([part.values for part in grouped], gated=fusion.gated),
                _join([part.scales for part in grouped], gated=fusion.gated),
                _join(minimums, gated=fusion.gated) if minimums else None,
            )
        )

    def _prepare(self, key: str, part: Tensor | GroupedWeight) -> Tensor | GroupedWeight:
        if isinstance(part, GroupedWeight):
            return part.dequantize() if key in self._dense_keys else part
        if self._quantization is None or key in self._dense_keys or not can_quantize(part.shape):
            return part
        quantization = "int8" if key in self._wide_keys else self._quantization
        try:
            with _one_thread():
                return self._quantizers[quantization](part)
        except ClientError as error:
            raise type(error)(f"{key}: {error.message}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Quantizing is many small operations, whose barriers cost more than a second thread gives."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _form(part: Tensor | GroupedWeight) -> str:
    """What all parts of one packed weight have in common."""
    if isinstance(part, GroupedWeight):
        return "8 bits" if part.minimums is None else "4 bits"
    return "dense"


def _dequantized(part: Tensor | GroupedWeight) -> Tensor:
    return part.dequantize() if isinstance(part, GroupedWeight) else part


def _join(parts: list[Tensor], *, gated: bool) -> Tensor:
    return interleave_gated(*_gate_and_up(parts)) if gated else torch.cat(parts)


def _gate_and_up(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2)
    return gate, up
