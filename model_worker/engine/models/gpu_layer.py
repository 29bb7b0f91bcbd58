"""One layer of the GPU decoder: torch modules over the ops' functions.

    residual, update ──► norm ──► qkv ──► (norms of q, k) ──► rotary + KV write ──► attention ──► output ──► update
    residual, update ──► norm ──► gate and up ──► activation ──► down ──► update
                                     or a mixture of experts, `gpu_mixture.py`

The residual is changed in place. What a part of a layer gives, its `update`, is added to it by the next norm, in one
pass; where the family has norms of outputs, by these. Modules are named like those of transformers that do the same,
which is how a trace knows what they are for; their keys are those of `decoder_fusions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from model_worker.engine.layers.attention import ForwardContext, KVShape
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.rms_norm import InputNorm, NormTerms, OutputNorm, RMSNorm
from model_worker.engine.layers.rotary_attention import RotaryAttention
from model_worker.engine.models.decoder_spec import DecoderSpec, LayerSpec
from model_worker.engine.models.gpu_mixture import DecoderMixture, MixtureTerms
from model_worker.engine.ops.gated_activation.functional import gated_activation
from model_worker.engine.ops.linear import Activation
from model_worker.engine.ops.rotary.functional import RotaryCosSin
from model_worker.engine.parallel.group import RankGroup
from model_worker.engine.parallel.row_norms import row_scales


class StepTerms(MixtureTerms, NormTerms, Protocol):
    """What the variants of a step's rows change in a decoder's layers."""


class DecoderLayer(nn.Module):
    """A layer with one MLP, or a mixture of such.

    Args:
        spec: of this rank: its heads, its share of each MLP.
        index: of the layer.
        context: of the decoder's attention.
        group: of the ranks, whose updates are added up.
        dtype: of activations.
    """

    def __init__(
        self, spec: DecoderSpec, index: int, context: ForwardContext, group: RankGroup, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        path = f"layers.{index}"
        self.rope = spec.layers[index].rope
        self.input_norms = nn.ModuleList(
            make_input_norm(spec, f"{path}.{name}", dtype) for name in spec.input_norms or ()
        )
        self.output_norms = nn.ModuleList(
            _make_output_norm(spec, f"{path}.{name}", dtype) for name in spec.output_norms or ()
        )
        self.self_attn = DecoderAttention(spec, spec.layers[index], path, context, group, dtype)
        mixture = spec.layers[index].mixture
        self.mlp: DecoderMLP | DecoderMixture = (
            DecoderMLP(spec, path, group, dtype)
            if mixture is None
            else DecoderMixture(spec, mixture, path, group, dtype)
        )

    def forward(
        self, residual: Tensor, update: Tensor | None, table: RotaryCosSin | None, terms: StepTerms | None
    ) -> Tensor | None:
        """The residual [T, hidden] is changed. Returns what is still to be added to it, if anything is."""
        normed = self._normed(0, residual, update, terms)
        update = self._normed_output(0, self.self_attn(normed, table, terms), residual, terms)
        normed = self._normed(1, residual, update, terms)
        return self._normed_output(1, self.mlp(normed, terms), residual, terms)

    def _normed(self, part: int, residual: Tensor, update: Tensor | None, terms: StepTerms | None) -> Tensor:
        """The input of a part of the layer. -> [T, hidden]"""
        if self.input_norms:
            normed: Tensor = self.input_norms[part](residual, update, terms)
            return normed
        assert update is None  # such families have norms of outputs
        return residual

    def _normed_output(self, part: int, out: Tensor, residual: Tensor, terms: StepTerms | None) -> Tensor | None:
        """What is still to be added to the residual."""
        if not self.output_norms:
            return out
        self.output_norms[part](out, residual, terms)
        return None


class DecoderAttention(nn.Module):
    """The attention of a layer with the products around it."""

    def __init__(
        self,
        spec: DecoderSpec,
        layer: LayerSpec,
        path: str,
        context: ForwardContext,
        group: RankGroup,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._num_heads, self._head_dim, self._group = spec.num_heads, spec.head_dim, group
        self._normalizes_rows, self._epsilon = spec.qk_norm == "row", spec.norm_epsilon
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self._sizes = [query, kv, kv]
        widths = (query + 2 * kv,) if spec.fused_names else (query, kv, kv)
        self.qkv_proj = FusedLinear(spec.hidden_size, widths, f"{path}.qkv", bias=spec.qkv_bias, dtype=dtype)
        self.o_proj = FusedLinear(query, (spec.hidden_size,), f"{path}.output", bias=spec.output_bias, dtype=dtype)
        self._normed: tuple[slice, ...] = ()  # columns of qkv
        self.qk_norms = nn.ModuleList()
        if spec.qk_norm == "head":
            self._normed = (slice(0, query + kv),)
            num_heads = spec.num_heads + spec.num_kv_heads
            self.qk_norms.append(_make_norm(query + kv, spec, f"{path}.qk_norm", dtype, num_heads))
        elif spec.qk_norm == "row":
            self._normed = (slice(0, query), slice(query, query + kv))
            self.qk_norms.append(_make_norm(query, spec, f"{path}.q_norm", dtype))
            self.qk_norms.append(_make_norm(kv, spec, f"{path}.k_norm", dtype))
        shape = KVShape(spec.num_kv_heads, spec.head_dim, spec.head_dim)
        self.paged_attention = RotaryAttention(context, layer.attention, shape)

    def forward(self, x: Tensor, table: RotaryCosSin | None, terms: StepTerms | None) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        num_rows = len(x)
        qkv = self.qkv_proj(x, terms)
        self._normalize(qkv, terms)
        query, key, value = (part.view(num_rows, -1, self._head_dim) for part in torch.split(qkv, self._sizes, dim=1))
        attended = self.paged_attention(query, key, value, table)
        return self._group.all_reduce(self.o_proj(attended.view(num_rows, -1), terms))

    def _normalize(self, qkv: Tensor, terms: StepTerms | None) -> None:
        """Queries and keys, in place."""
        parts = [qkv[:, columns] for columns in self._normed]
        scales: Sequence[Tensor | None] = [None] * len(parts)
        if self._normalizes_rows and self._group.size > 1:
            scales = row_scales(parts, self._epsilon, self._group)
        for norm, part, scale in zip(self.qk_norms, parts, scales, strict=True):
            norm(part, terms, out=part)
            if scale is not None:
                part.mul_(scale)


class DecoderMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x)"""

    def __init__(self, spec: DecoderSpec, path: str, group: RankGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self._group = group
        inner = spec.intermediate_size
        widths = (2 * inner,) if spec.fused_names else (inner, inner)
        self.gate_up_proj = FusedLinear(spec.hidden_size, widths, f"{path}.gate_up", bias=spec.mlp_bias, dtype=dtype)
        self.act_fn = GatedActivation(spec.activation)
        self.down_proj = FusedLinear(inner, (spec.hidden_size,), f"{path}.down", bias=spec.mlp_bias, dtype=dtype)

    def forward(self, x: Tensor, terms: StepTerms | None) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self._group.all_reduce(self.down_proj(self.act_fn(self.gate_up_proj(x, terms)), terms))


class GatedActivation(nn.Module):
    """See `ops/gated_activation`."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [T, 2 I] -> [T, I]"""
        return gated_activation(x, self._activation)


def make_input_norm(spec: DecoderSpec, key: str, dtype: torch.dtype) -> InputNorm:
    """A norm before a part of a layer, or after the last one."""
    return InputNorm(
        spec.hidden_size, spec.norm_epsilon, key, dtype=_norm_dtype(spec, dtype), multiplier=spec.residual_multiplier
    )


def _make_output_norm(spec: DecoderSpec, key: str, dtype: torch.dtype) -> OutputNorm:
    return OutputNorm(
        spec.hidden_size, spec.norm_epsilon, key, dtype=_norm_dtype(spec, dtype), multiplier=spec.residual_multiplier
    )


def _make_norm(size: int, spec: DecoderSpec, key: str, dtype: torch.dtype, num_heads: int = 1) -> RMSNorm:
    return RMSNorm(size, spec.norm_epsilon, key, dtype=_norm_dtype(spec, dtype), num_heads=num_heads)


def _norm_dtype(spec: DecoderSpec, dtype: torch.dtype) -> torch.dtype:
    """Of the weights of norms."""
    return dtype if spec.norm_rounds_first else torch.float32
