"""Modules whose rows use variants, for one step: each stands in for a module's own way of computing while it lasts.

    VariantMethod        of a `Linear`: y = e ∘ ((d ∘ x) W^T) + b + Σ u ∘ ((v ∘ x) S^T) + (x A^T) B^T + x Z^T + c, by
                         segments of rows
    VariantEmbedding     replaced rows, low-rank terms and planes of signs of an embedding
    VariantExperts       the same formula as for a `Linear` in each expert of a mixture
    VariantModule        any other module of few weights, a norm or a router: a copy with the variant's weights

Rows of no segment are computed as in a step without variants. Terms are those of `delta.variant_terms`; matrices have
the dtype of x. A step's `SegmentPlan` is one for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from delta.merge_terms import signs_to_dense
from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane
from model_worker.engine.layers.linear import Linear, LinearMethod
from model_worker.engine.layers.row_axes import RowAxes, tensors
from model_worker.engine.layers.sparse import sparse_product
from model_worker.engine.ops.low_rank import Factors, LowRankFactors, SegmentPlan, add_low_rank, to_device
from model_worker.engine.ops.sign_matmul import LayerSigns, SignMatrix, add_signs, planes_table


class BoundLinear(NamedTuple):
    """Terms of a linear layer where it is computed.

    Attributes:
        terms: all but the planes.
        signs: the planes.
    """

    terms: LinearTerms
    signs: tuple[SignMatrix, ...] = ()


class VariantMethod:
    """A `LinearMethod`.

    Args:
        method: of the layer, for the base's product.
        bound: of each segment of the plan; None: that segment is the base's in this layer.
        table: [1, S, columns] of `table_rows` on the device; None on CPUs.
        signs_table: [1, S, P, columns] of `planes_table` on the device; None on CPUs.
    """

    def __init__(
        self,
        method: LinearMethod,
        bound: Sequence[BoundLinear | None],
        plan: SegmentPlan,
        table: Tensor | None,
        signs_table: Tensor | None = None,
    ) -> None:
        self._method = method
        self._plan = plan
        self._table = table
        self._signs_table = signs_table
        self._bound = bound
        self._segments = [
            (slice(*bounds), part.terms) for bounds, part in zip(plan.bounds, bound, strict=True) if part is not None
        ]
        self._scales_inputs = any(part.input_scale is not None for _, part in self._segments)
        self._scales_outputs = any(part.output_scale is not None for _, part in self._segments)
        self._adds_low_rank = any(part.rank for _, part in self._segments)
        self._adds_signs = any(part is not None and part.signs for part in bound)

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [T, K]
        assert len(rows) == self._plan.num_rows
        scaled = self._scale_inputs(rows) if self._scales_inputs else rows
        y = self._method.apply(layer, scaled, None if self._scales_outputs else bias)  # [T, N]
        if self._scales_outputs:
            for segment, terms in self._segments:
                if terms.output_scale is not None:
                    y[segment] *= terms.output_scale
            if bias is not None:
                y += bias
        for segment, terms in self._segments:
            _add_matrices(rows[segment], y[segment], terms)
        if self._adds_low_rank:
            add_low_rank(rows, y, self._factors(layer.out_features), self._plan)
        if self._adds_signs:
            planes = tuple(() if part is None else part.signs for part in self._bound)
            add_signs(rows, y, LayerSigns((planes,), (slice(0, layer.out_features),), self._signs_table), self._plan)
        return y.view(*x.shape[:-1], -1)

    def weight(self, layer: Linear) -> Tensor:
        return self._method.weight(layer)

    def _scale_inputs(self, rows: Tensor) -> Tensor:
        scaled = rows.clone()
        for segment, terms in self._segments:
            if terms.input_scale is not None:
                scaled[segment] *= terms.input_scale
        return scaled

    def _factors(self, num_outputs: int) -> LowRankFactors:
        return LowRankFactors((tuple(map(factors_of, self._bound)),), (num_outputs,), self._table)


def factors_of(bound: BoundLinear | None) -> Factors | None:
    """A and B, if there are any."""
    if bound is None or bound.terms.a is None or bound.terms.b is None:
        return None
    return Factors(bound.terms.a, bound.terms.b)


def _add_matrices(x: Tensor, y: Tensor, terms: LinearTerms) -> None:
    """y [n, N] += x [n, K] Z^T + c"""
    if terms.dense is not None:
        y += F.linear(x, terms.dense)
    if terms.sparse is not None:
        y += sparse_product(x, terms.sparse)
    if terms.bias is not None:
        y += terms.bias


class VariantEmbedding:
    """The forward of an embedding.

    Args:
        embedding: subclasses may do more with the rows that they look up, but nothing else.
        segments: rows, and their terms. `a` is [V, r] here, rows first; `token_ids` and `rows` hold the extra rows too.
    """

    def __init__(self, embedding: nn.Embedding, segments: Sequence[tuple[slice, EmbeddingTerms]]) -> None:
        self._forward: Callable[[Tensor], Tensor] = embedding.forward
        self._embedding = embedding
        self._segments = segments

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[1, T] or [T] -> [..., H]"""
        out = self._forward(token_ids.clamp(max=self._embedding.num_embeddings - 1))
        for segment, terms in self._segments:
            out[..., segment, :] = self._look_up(token_ids[..., segment], terms)
        return out

    def _look_up(self, token_ids: Tensor, terms: EmbeddingTerms) -> Tensor:
        """Looks the rows up in a table of the right ones. Those of tokens that the base does not have are given."""
        tokens = token_ids.flatten()
        ids = tokens.clamp(max=self._embedding.num_embeddings - 1)
        table = self._embedding.weight[ids].float()  # [T, H]
        for plane in terms.signs:
            table += signs_to_dense(
                SignPlane(plane.bits[ids], plane.row_scale[ids], plane.column_scale), table.shape[1]
            )
        if terms.token_ids is not None and terms.rows is not None:
            places = torch.searchsorted(terms.token_ids, tokens).clamp_(max=len(terms.token_ids) - 1)
            replaced = terms.token_ids[places] == tokens
            table = torch.where(replaced[:, None], terms.rows[places].float(), table)
        if terms.a is not None and terms.b is not None:
            known = (tokens < self._embedding.num_embeddings)[:, None]
            table += known * (terms.a[ids].float() @ terms.b.float().T)
        stand_in = with_parameters(self._embedding, {"weight": table.to(self._embedding.weight.dtype)})
        stand_in.padding_idx = None
        places = torch.arange(len(ids), device=ids.device)
        rows: Tensor = stand_in.forward(places.view(token_ids.shape))
        return rows


class VariantModule:
    """The forward of a module that computes each row by itself.

    Args:
        module: gets one tensor, and perhaps arguments that are none.
        segments: rows, and a copy of the module that is to compute them.
    """

    def __init__(self, module: nn.Module, axes: RowAxes, segments: Sequence[tuple[slice, nn.Module]]) -> None:
        self._forward: Callable[..., Any] = module.forward
        self._axes = axes
        self._segments = segments

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self._forward(x, *args, **kwargs)
        for segment, stand_in in self._segments:
            start, length = segment.start, segment.stop - segment.start
            part = stand_in.forward(x.narrow(self._axes.input, start, length), *args, **kwargs)
            for axis, target, source in zip(self._axes.outputs, tensors((out,)), tensors((part,)), strict=True):
                target.narrow(axis, start, length).copy_(source)
        return out


EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""Of transformers' experts, that can have terms."""


class ExpertsTerms(NamedTuple):
    """Of a mixture, by expert, in [E, N, K] whichever way the module stores its weights."""

    up: Mapping[int, BoundLinear]
    down: Mapping[int, BoundLinear]


class VariantExperts:
    """The forward of transformers' experts.

    Args:
        module: experts that say how they are stored (`use_experts_implementation`).
        segments: rows, and their terms.
    """

    @staticmethod
    def knows(module: Any) -> bool:
        """Whether a module's experts can have terms."""
        return hasattr(module, "has_gate") and not module.has_post_expert_norm

    def __init__(self, module: nn.Module, segments: Sequence[tuple[slice, ExpertsTerms]]) -> None:
        self._forward: Callable[..., Tensor] = module.forward
        self._module: Any = module
        self._segments = segments

    def __call__(self, x: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], the experts of each row and their weights [T, k] -> [T, H]"""
        out = self._forward(x, choices, weights)
        for rows, terms in self._segments:
            out[rows] = self._mix(x[rows], choices[rows], weights[rows], terms)
        return out

    def _mix(self, x: Tensor, choices: Tensor, weights: Tensor, terms: ExpertsTerms) -> Tensor:
        module = self._module
        mixed = torch.zeros_like(x, dtype=torch.float32)
        for expert in torch.unique(choices).tolist():
            rows, places = (choices == expert).nonzero(as_tuple=True)
            inner = self.linear(self.up_name, expert, x[rows], terms.up.get(expert))
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            y = self.linear("down_proj", expert, inner, terms.down.get(expert))
            mixed.index_add_(0, rows, (y * weights[rows, places, None]).float())
        return mixed.to(x.dtype)

    @property
    def up_name(self) -> str:
        """The parameter of the first products."""
        return "gate_up_proj" if self._module.has_gate else "up_proj"

    def linear(self, name: str, expert: int, x: Tensor, bound: BoundLinear | None) -> Tensor:
        """The product of one expert with rows that chose it. x [n, K] -> [n, N]"""
        weight: Tensor = getattr(self._module, name)[expert]
        bias: Tensor | None = getattr(self._module, f"{name}_bias")[expert] if self._module.has_bias else None
        return linear_with_terms(x, weight.T if self._module.is_transposed else weight, bias, bound)


def linear_with_terms(x: Tensor, weight: Tensor, bias: Tensor | None, bound: BoundLinear | None) -> Tensor:
    """x [n, K], weight [N, K], bias [N] -> [n, N]"""
    if bound is None:
        return F.linear(x, weight, bias)
    terms, signs = bound
    y = F.linear(x if terms.input_scale is None else (x * terms.input_scale).to(x.dtype), weight)
    if terms.output_scale is not None:
        y *= terms.output_scale
    if bias is not None:
        y += bias
    if terms.a is not None and terms.b is not None:
        y += F.linear(F.linear(x, terms.a), terms.b)
    _add_matrices(x, y, terms)
    if signs:
        plan = SegmentPlan.of([(0, len(x))], num_rows=len(x), max_rank=0, device=x.device)
        columns, table = slice(0, len(weight)), None
        if x.device.type != "cpu":
            table = to_device(planes_table(signs, len(signs), columns)[None, None], x.device)
        add_signs(x, y, LayerSigns(((signs,),), (columns,), table), plan)
    return y


def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> Any:
    """A copy of a module without children that has other parameters and shares everything else."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.pop("forward", None)  # of a step
    new = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()}
    copy.__dict__["_parameters"] = {**module._parameters, **new}
    return copy


@contextmanager
def substituted(
    methods: Mapping[Linear, LinearMethod], forwards: Mapping[nn.Module, Callable[..., Any]]
) -> Iterator[None]:
    """Linears use these methods, and other modules these forwards, until the context ends."""
    own = [(layer, layer.method) for layer in methods]
    try:
        for layer, method in methods.items():
            layer.__dict__["method"] = method  # nn.Module's own way of setting it takes a microsecond
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for layer, method in own:
            layer.__dict__["method"] = method
        for module in forwards:
            module.__dict__.pop("forward", None)
