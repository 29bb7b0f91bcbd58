"""The operations of a native decoder, in the order of its program.

embedding ──► layer × N ──► norm                                            tokens to hidden states
                norm ► qkv ► (norms of q, k) ► rotary + KV write ► attention ► output, added to x
                norm ► gate and up, activated ► down, added to x         (or experts, for the rows that chose them)
rows ──► head                                                              hidden states to logits
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_worker.engine.models.decoder_spec import DecoderSpec, Mixture
from model_worker.engine.models.native_attention import NativeAttention
from model_worker.engine.models.native_weights import NativeWeights
from model_worker.engine.ops.cpu.machine_level import MachineLevel
from model_worker.engine.ops.cpu.program import Operation, new_buffer
from model_worker.engine.ops.embedding import Embedding
from model_worker.engine.ops.experts import (
    CombineExperts,
    ExpertLinear,
    ExpertPlan,
    GatherRows,
    GroupByExpert,
    SelectExperts,
)
from model_worker.engine.ops.linear import Activation, Linear, PackedWeight, QuantizedRows, QuantizeRows
from model_worker.engine.ops.paged_attention.operation import PagedAttention, allocate_workspace
from model_worker.engine.ops.rms_norm import RMSNorm
from model_worker.engine.ops.rotary import RotaryKV, RotaryTable


class NativeOperations:
    """Puts operations on their buffers, once weights and KV cache are there.

    Args:
        spec: of the decoder.
        weights: packed, filled.
        attentions: one for each layer, in order, with their caches.
        max_rows: most tokens of one step.
        level: of the kernels.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: NativeWeights,
        attentions: Sequence[NativeAttention],
        *,
        max_rows: int,
        level: MachineLevel,
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._attentions = attentions
        self._max_rows = max_rows
        self._level = level
        self._quantized: dict[tuple[int, int], QuantizedRows] = {}  # by shape; filled anew before each product

    def decoder(self, hidden: Tensor) -> Iterator[Operation]:
        """Tokens to hidden states, [max_rows, hidden], after the final norm."""
        spec, rows = self._spec, self._max_rows
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        x = new_buffer(rows, spec.hidden_size)
        normed = new_buffer(rows, spec.hidden_size)
        qkv = new_buffer(rows, query_size + 2 * kv_size)
        query, key, value = torch.split(qkv, [query_size, kv_size, kv_size], dim=1)
        attended = new_buffer(rows, query_size)
        activated = new_buffer(rows, _whole_halves(spec.intermediate_size))
        tables = {
            kind: RotaryTable.allocate(f"rotary.{kind}", rope.inverse_frequencies, rope.attention_scaling, rows)
            for kind, rope in spec.ropes.items()
        }
        workspace = allocate_workspace()
        mixtures: dict[Mixture, _MixtureBuffers] = {}  # most models have one kind

        yield Embedding("embedding", self._weights.matrices["embedding"], x, spec.embed_multiplier)
        yield from tables.values()
        for i, (layer, attention) in enumerate(zip(spec.layers, self._attentions, strict=True)):
            path = f"layers.{i}"
            before_attention, before_mlp = spec.input_norms or (None, None)
            after_attention, after_mlp = spec.output_norms or (None, None)
            yield from self._norm(path, before_attention, x, normed)
            yield from self._linear(f"{path}.qkv", normed if before_attention else x, qkv)
            if spec.qk_norm is not None:
                per_head = spec.qk_norm == "head"
                yield from self._norm(path, "q_norm", query, query, num_heads=spec.num_heads if per_head else 1)
                yield from self._norm(path, "k_norm", key, key, num_heads=spec.num_kv_heads if per_head else 1)
            table = None if layer.rope is None else tables[layer.rope]
            layout, group, params = attention.layout, attention.group, attention.params
            assert layout is not None, "the KV cache is not allocated"
            (blocks,) = attention.caches
            yield RotaryKV(f"{path}.rotary", query, key, value, table, blocks, layout, group)
            yield PagedAttention(f"{path}.attention", query, blocks, layout, params, attended, workspace, group)
            yield from self._add_linear(path, "output", attended, x, normed, after_attention)
            yield from self._norm(path, before_mlp, x, normed)
            source = normed if before_mlp else x
            if layer.mixture is not None:
                assert after_mlp is None
                if layer.mixture not in mixtures:
                    mixtures[layer.mixture] = _MixtureBuffers.allocate(rows, spec, layer.mixture)
                yield from self._experts(path, layer.mixture, mixtures[layer.mixture], source, x)
                continue
            yield from self._linear(f"{path}.gate_up", source, activated, activation=spec.activation)
            yield from self._add_linear(path, "down", activated[:, : spec.intermediate_size], x, normed, after_mlp)
        yield self._norm_operation("norm", x, hidden)

    def head(self, rows: Tensor, logits: Tensor) -> Iterator[Operation]:
        """Hidden states to logits: [R, hidden] -> [R, vocab_size]."""
        weight = self._weights.matrices.get("head", self._weights.matrices["embedding"])
        alpha = 1.0 / self._spec.logits_divisor
        yield from self._linear("head", rows, logits, weight=weight, alpha=alpha)

    def _experts(
        self, path: str, mixture: Mixture, buffers: _MixtureBuffers, x: Tensor, out: Tensor
    ) -> Iterator[Operation]:
        """out += residual_multiplier * the weighted sum of the experts' MLPs of x."""
        plan, activated = buffers.plan, buffers.activated
        yield from self._linear(f"{path}.router", x, buffers.logits)
        yield SelectExperts(f"{path}.experts.select", buffers.logits, plan, mixture.normalize)
        yield GroupByExpert(f"{path}.experts.group", plan)
        yield GatherRows(f"{path}.experts.gather", x, plan, buffers.rows)
        yield from self._expert_linear(f"{path}.experts.gate_up", buffers.rows, activated, plan, self._spec.activation)
        inner = activated[:, : mixture.intermediate_size]
        yield from self._expert_linear(f"{path}.experts.down", inner, buffers.results, plan, Activation.NONE)
        yield CombineExperts(f"{path}.experts.combine", buffers.results, plan, out, self._spec.residual_multiplier)

    def _expert_linear(
        self, key: str, x: Tensor, out: Tensor, plan: ExpertPlan, activation: Activation
    ) -> Iterator[Operation]:
        weight = self._weights.matrices[key]
        quantized = None
        if self._quantizes_rows(weight):
            quantized = self._quantized_rows(x)
            yield QuantizeRows(f"{key}.input", x, quantized, plan.num_chosen)
        yield ExpertLinear(key, x, weight, out, plan, activation, quantized)

    def _quantizes_rows(self, weight: PackedWeight) -> bool:
        return weight.format.is_quantized and self._level.has_integer_dot

    def _quantized_rows(self, x: Tensor) -> QuantizedRows:
        """For x quantized; all products of inputs of this shape share it, because each is complete before the next."""
        num_rows, num_inputs = x.shape
        if (num_rows, num_inputs) not in self._quantized:
            self._quantized[num_rows, num_inputs] = QuantizedRows.allocate(num_rows, num_inputs)
        return self._quantized[num_rows, num_inputs]

    def _norm(self, path: str, name: str | None, x: Tensor, out: Tensor, **options: Any) -> Iterator[Operation]:
        """A norm of a layer, if it has this one."""
        if name is not None:
            yield self._norm_operation(f"{path}.{name}", x, out, **options)

    def _norm_operation(self, key: str, x: Tensor, out: Tensor, **options: Any) -> RMSNorm:
        return RMSNorm(key, x, self._weights.vectors[key], out, self._spec.norm_epsilon, **options)

    def _linear(
        self, key: str, x: Tensor, out: Tensor, *, weight: PackedWeight | None = None, **options: Any
    ) -> Iterator[Operation]:
        """A product; before it, where weights and machine want it, the quantization of its input."""
        weight = self._weights.matrices[key] if weight is None else weight
        quantized = None
        if self._quantizes_rows(weight):
            quantized = self._quantized_rows(x)
            yield QuantizeRows(f"{key}.input", x, quantized)
        bias = self._weights.vectors.get(f"{key}.bias")
        yield Linear(key, x, weight, out, bias, quantized_x=quantized, **options)

    def _add_linear(
        self, path: str, name: str, x: Tensor, residual: Tensor, scratch: Tensor, norm: str | None
    ) -> Iterator[Operation]:
        """residual += residual_multiplier * norm(W x + b); `scratch` is free to use."""
        multiplier = self._spec.residual_multiplier
        if norm is None:
            yield from self._linear(f"{path}.{name}", x, residual, accumulate=True, alpha=multiplier)
        else:
            yield from self._linear(f"{path}.{name}", x, scratch)
            yield from self._norm(path, norm, scratch, residual, accumulate=True, alpha=multiplier)


@dataclass(frozen=True, slots=True, eq=False)
class _MixtureBuffers:
    """For T tokens, each computed by k experts.

    Attributes:
        logits: [T, num_experts] of the router.
        rows, results: [T * k, hidden], in the order of the plan.
        activated: [T * k, intermediate_size, padded]
    """

    plan: ExpertPlan
    logits: Tensor
    rows: Tensor
    activated: Tensor
    results: Tensor

    @classmethod
    def allocate(cls, num_rows: int, spec: DecoderSpec, mixture: Mixture) -> _MixtureBuffers:
        num_pairs = num_rows * mixture.num_chosen
        return cls(
            ExpertPlan.allocate(num_rows, mixture.num_experts, mixture.num_chosen),
            new_buffer(num_rows, mixture.num_experts),
            new_buffer(num_pairs, spec.hidden_size),
            new_buffer(num_pairs, _whole_halves(mixture.intermediate_size)),
            new_buffer(num_pairs, spec.hidden_size),
        )


def _whole_halves(size: int) -> int:
    """Columns that a gated product writes: a panel gives 16."""
    return -(-size // 16) * 16
