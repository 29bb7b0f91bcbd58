"""The mixture of experts of a layer of the GPU decoder.

    x ──► gate ──► choices ──► pairs by expert ──► gate and up ──► activation ──► down ──► weighted sum

Nothing of it is known to the host, so that a step can be captured in a graph. Rows whose variants change experts are
the exception: they are computed again, expert by expert, by `VariantExperts`, which asks the device whom they chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from delta.variant_terms import LinearTerms, SignPlane
from model_worker.engine.layers.fused_linear import FusedLinear, LinearTerms as LayerTerms
from model_worker.engine.layers.variants import BoundLinear, ExpertsTerms, VariantExperts, linear_with_terms
from model_worker.engine.models.decoder_spec import DecoderSpec, Mixture
from model_worker.engine.ops.experts.functional import (
    combine_experts,
    expert_linear,
    group_by_expert,
    select_experts,
)
from model_worker.engine.ops.gated_activation.functional import gated_activation
from model_worker.engine.ops.linear import Activation
from model_worker.engine.ops.sign_matmul import SignMatrix
from model_worker.engine.parallel.group import RankGroup

_SIGN_ROWS = (1, 65)  # of an expert, whose tiles are those of few rows and of many


class MixtureTerms(LayerTerms, Protocol):
    """What the variants of a step's rows change in a mixture."""

    def experts(self, key: str) -> Sequence[tuple[slice, ExpertsTerms]]:
        """The rows whose variants change these experts, and how."""
        ...


class DecoderMixture(nn.Module):
    """The experts' MLPs, weighted: sum over the chosen of share_e * W_down,e (act(W_gate,e x) * W_up,e x)"""

    def __init__(self, spec: DecoderSpec, mixture: Mixture, path: str, group: RankGroup, dtype: torch.dtype) -> None:
        super().__init__()
        self._mixture, self._group = mixture, group
        self.gate = FusedLinear(spec.hidden_size, (mixture.num_experts,), f"{path}.router", bias=False, dtype=dtype)
        self.experts = DecoderExperts(spec, mixture, f"{path}.experts", dtype)

    def forward(self, x: Tensor, terms: MixtureTerms | None) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        choices, weights = self._select(self.gate(x, terms))
        changed = () if terms is None else terms.experts(self.experts.key)
        experts = VariantExperts(self.experts, changed) if changed else self.experts
        return self._group.all_reduce(experts(x, choices, weights))

    def warm_up(self) -> None:
        """Launch what steps launch, those of variants too, so that no kernel is compiled in a request."""
        from model_worker.engine.ops.experts.triton import rows_of_every_tile  # not installed where there is no GPU

        weight = self.experts.down_proj
        for num_rows in rows_of_every_tile(self._mixture.num_experts, self._mixture.num_chosen):
            x = torch.zeros(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
            self.experts(x, *self._select(x.new_zeros(num_rows, self._mixture.num_experts)))
        for weights in (self.experts.gate_up_proj, self.experts.down_proj):
            signs = _no_signs(weights[0])
            for num_rows in _SIGN_ROWS:
                x = weights.new_zeros(num_rows, weights.shape[2])
                linear_with_terms(x, weights[0], None, BoundLinear(LinearTerms(), (signs,)))

    def _select(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return select_experts(logits, self._mixture.num_chosen, normalize=self._mixture.normalize)


class DecoderExperts(nn.Module):
    """The experts of a mixture, whose weights are stored and named like transformers', as `VariantExperts` expects.

    Attributes:
        key: of these experts in the decoder.
        gate_up_proj: [E, 2 I, H], the gate first.
        down_proj: [E, H, I]
    """

    has_gate, has_bias, is_transposed = True, False, False
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, spec: DecoderSpec, mixture: Mixture, key: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.key = key
        self._activation: Activation = spec.activation
        hidden, inner = spec.hidden_size, mixture.intermediate_size
        for name, *sizes in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            weight = torch.empty(mixture.num_experts, *sizes, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], the experts of each row and their weights [T, k] -> [T, H]"""
        groups = group_by_expert(choices, len(self.gate_up_proj))
        inner = self._apply_gate(expert_linear(x, self.gate_up_proj, groups, gathers=True))
        return combine_experts(expert_linear(inner, self.down_proj, groups), groups, weights)

    def _apply_gate(self, x: Tensor) -> Tensor:
        """x [n, 2 I] -> [n, I]"""
        return gated_activation(x, self._activation)


def _no_signs(weight: Tensor) -> SignMatrix:
    """A plane beside a matrix [N, K] that adds nothing to it."""
    num_outputs, num_inputs = weight.shape
    plane = SignPlane(torch.zeros(num_outputs, -(-num_inputs // 8), dtype=torch.uint8), torch.zeros(num_outputs))
    return SignMatrix(plane, num_inputs, dtype=weight.dtype, device=weight.device)
