"""Variants of a `TransformersModel`: terms bound to its modules, and what takes the modules' places for a step.

    bind          terms by name ──► by module, on the model's device, matrices in the dtype of the module's input
    in_decoder    the segments of a batch ──► a method for each linear, a forward for each other module that has terms

Which modules can have terms is known from the dry run: those that compute each token by itself (`RowAxes`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from delta.extra_tokens import given_rows
from delta.merge_terms import merge_linear
from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane, SparseMatrix, VariantTerms
from model_worker.engine.layers.extra_head import ExtraHead
from model_worker.engine.layers.linear import Linear, LinearMethod
from model_worker.engine.layers.row_axes import RowAxes
from model_worker.engine.layers.variants import (
    EXPERT_PARAMETERS,
    BoundLinear,
    ExpertsTerms,
    VariantEmbedding,
    VariantExperts,
    VariantMethod,
    VariantModule,
    factors_of,
    substituted,
    with_parameters,
)
from model_worker.engine.lora.bound_variant import BoundVariant, VariantSegments
from model_worker.engine.models.warm_up_terms import warm_up_experts, warm_up_terms
from model_worker.engine.ops.low_rank import SegmentPlan, table_rows, to_device
from model_worker.engine.ops.sign_matmul import SignMatrix, planes_table
from registry.errors import UnsupportedModelError

_WARM_UP_ROWS = (1, 65)  # of one variant: for tiles with few rows, and with many


_Module = TypeVar("_Module", bound=nn.Module)
_Terms = TypeVar("_Terms")


@dataclass(slots=True, eq=False)
class TransformersVariant:
    """A `BoundVariant`.

    Attributes:
        num_bytes: of what was made for it; tensors that were as they are needed are shared with the terms.
        linears, embeddings, experts: terms by module; of embeddings as `VariantEmbedding` has them.
        extra_head: for tokens that the base does not have; None: there are none.
        modules: of other modules, the copies that have the variant's weights.
        table: [number of the model's linears, columns] of `table_rows`, on the host; None where the model is on a CPU.
        signs_table: [number of the model's linears, its most planes, columns] of `planes_table`, likewise.
    """

    num_bytes: int = 0
    linears: dict[Linear, BoundLinear] = field(default_factory=dict)
    embeddings: dict[nn.Embedding, EmbeddingTerms] = field(default_factory=dict)
    experts: dict[nn.Module, ExpertsTerms] = field(default_factory=dict)
    modules: dict[nn.Module, nn.Module] = field(default_factory=dict)
    extra_head: ExtraHead | None = None
    table: Tensor | None = None
    signs_table: Tensor | None = None

    @property
    def max_rank(self) -> int:
        return max((bound.terms.rank for bound in self.linears.values()), default=0)

    @property
    def num_extra_tokens(self) -> int:
        """Of its own, beyond the base's vocabulary."""
        return 0 if self.extra_head is None else len(self.extra_head.rows)

    @property
    def max_planes(self) -> int:
        return max((len(bound.signs) for bound in self.linears.values()), default=0)


class TransformersVariants:
    """What a model needs for its variants.

    Args:
        causal_lm: transformers' module with our linears, when its weights are there.
        axes: of the modules that compute each token by itself.
        device: of the weights.
    """

    def __init__(self, causal_lm: Any, axes: Mapping[nn.Module, RowAxes], device: torch.device) -> None:
        self._causal_lm = causal_lm
        self._axes = axes
        self._device = device
        linears = [module for module in causal_lm.modules() if isinstance(module, Linear)]
        self._places = {linear: place for place, linear in enumerate(linears)}

    def weight(self, module: str) -> Tensor:
        """See `VariantHost.base_weight`."""
        path, _, last = module.rpartition(".")
        if last.isdecimal() and (expert := self._expert(path, int(last))) is not None:
            return expert
        found = self._find(module)
        weight = found.method.weight(found) if isinstance(found, Linear) else getattr(found, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise KeyError(module)
        return weight.detach().float().cpu()

    def _expert(self, parameter: str, index: int) -> Tensor | None:
        """[N, K] float32 of a parameter that holds all experts; None: it is none."""
        path, _, name = parameter.rpartition(".")
        module = self._find(path)
        weights = module._parameters.get(name)
        if weights is None or weights.ndim != 3:
            return None
        weight = weights[index].detach().float()
        return weight.T if getattr(module, "is_transposed", True) else weight  # Llama 4 does not say that they are

    def bias(self, module: str) -> Tensor:
        """See `TransformersModel.base_bias`."""
        bias = getattr(self._find(module), "bias", None)
        if not isinstance(bias, Tensor):
            raise KeyError(module)
        return bias.detach().float().cpu()

    @torch.no_grad()
    def bind(self, terms: VariantTerms) -> TransformersVariant:
        """See `VariantHost.bind`."""
        binder = _Binder(self._causal_lm, self._axes, self._device)
        bound = binder.bind(terms)
        if self._device.type != "cpu":
            of_places = [bound.linears.get(linear) for linear in self._places]
            bound.table = table_rows([factors_of(each) for each in of_places])
            bound.signs_table = torch.stack(
                [
                    planes_table(() if each is None else each.signs, bound.max_planes, slice(0, linear.out_features))
                    for linear, each in zip(self._places, of_places, strict=True)
                ]
            )
        return bound

    @torch.no_grad()
    def warm_up(self) -> None:
        """Launch what rows of variants launch in layers of each shape, so that no kernel is compiled in a request."""
        names = {module: name for name, module in self._causal_lm.named_modules()}
        linears: dict[tuple[int, int, torch.dtype], Linear] = {}
        for linear in self._places:
            axes = self._axes.get(linear)
            if axes is not None and axes.rows_lead:
                linears.setdefault((linear.in_features, linear.out_features, axes.dtype), linear)
        terms = {
            names[linear]: warm_up_terms(num_inputs, num_outputs, num_planes=1)
            for (num_inputs, num_outputs, _), linear in linears.items()
        }
        variant = self.bind(VariantTerms("", terms, warm_up_experts(names)))
        for num_rows in _WARM_UP_ROWS:
            methods = self._methods(list(linears.values()), [(slice(0, num_rows), variant)], num_rows)
            for (num_inputs, _, dtype), linear in linears.items():
                x = torch.zeros(num_rows, num_inputs, dtype=dtype, device=self._device)
                methods[linear].apply(linear, x, linear.bias)
            for experts, of_experts in variant.experts.items():
                forward = VariantExperts(experts, ())
                for name, bound in ((forward.up_name, of_experts.up), ("down_proj", of_experts.down)):
                    for expert, of_expert in bound.items():
                        assert of_expert.terms.a is not None
                        x = torch.zeros_like(of_expert.terms.a).repeat(num_rows, 1)
                        forward.linear(name, expert, x, of_expert)

    def in_decoder(self, segments: VariantSegments, num_rows: int) -> AbstractContextManager[None]:
        """The decoder computes these of its rows with their variants until the context ends."""
        variants = _variants(segments)
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for embedding, rows in _by_module((segment, variant.embeddings) for segment, variant in variants).items():
            forwards[embedding] = VariantEmbedding(embedding, rows)
        for experts, rows_of_experts in _by_module((segment, variant.experts) for segment, variant in variants).items():
            forwards[experts] = VariantExperts(experts, rows_of_experts)
        for module, copies in _by_module((segment, variant.modules) for segment, variant in variants).items():
            forwards[module] = VariantModule(module, self._axes[module], copies)
        linears = dict.fromkeys(linear for _, variant in variants for linear in variant.linears)
        return substituted(self._methods(list(linears), variants, num_rows), forwards)

    def in_head(self, head: Linear, segments: VariantSegments, num_rows: int) -> AbstractContextManager[None]:
        """The output head computes these of its rows with their variants until the context ends."""
        variants = [(segment, variant) for segment, variant in _variants(segments) if head in variant.linears]
        return substituted(self._methods([head] if variants else [], variants, num_rows), {})

    def extra_logits(self, hidden: Tensor, variant: BoundVariant) -> Tensor:
        """Before they are scaled. hidden [n, hidden] -> [n, E]"""
        assert isinstance(variant, TransformersVariant)
        assert variant.extra_head is not None
        return variant.extra_head(hidden)

    def _methods(
        self, linears: Sequence[Linear], variants: Sequence[tuple[slice, TransformersVariant]], num_rows: int
    ) -> dict[Linear, LinearMethod]:
        """What computes these layers, in all of which the step has one plan."""
        plan = SegmentPlan.of(
            [(segment.start, segment.stop) for segment, _ in variants],
            num_rows=num_rows,
            max_rank=max((variant.max_rank for _, variant in variants), default=0),
            device=self._device,
        )
        tables = [variant.table for _, variant in variants if variant.table is not None]
        places = [self._places[linear] for linear in linears]
        table = to_device(torch.stack([rows[places] for rows in tables], dim=1), self._device) if tables else None
        signs_table = self._signs_table(places, [variant for _, variant in variants])
        return {
            linear: VariantMethod(
                linear.method,
                [variant.linears.get(linear) for _, variant in variants],
                plan,
                None if table is None else table[place : place + 1],
                None if signs_table is None else signs_table[place : place + 1],
            )
            for place, linear in enumerate(linears)
        }

    def _signs_table(self, places: Sequence[int], variants: Sequence[TransformersVariant]) -> Tensor | None:
        """[layers, S, P, columns] on the device; None: on a CPU, or there are no planes."""
        most = max((variant.max_planes for variant in variants), default=0)
        tables = [variant.signs_table for variant in variants if variant.signs_table is not None]
        if most == 0 or not tables:
            return None
        padded = [functional.pad(rows[places], (0, 0, 0, most - rows.shape[1])) for rows in tables]
        return to_device(torch.stack(padded, dim=1), self._device)

    def _find(self, module: str) -> nn.Module:
        try:
            found: nn.Module = self._causal_lm.get_submodule(module)
        except AttributeError as error:
            raise KeyError(module) from error
        return found


class _Binder:
    """Binds the terms of one variant."""

    def __init__(self, causal_lm: Any, axes: Mapping[nn.Module, RowAxes], device: torch.device) -> None:
        self._causal_lm = causal_lm
        self._axes = axes
        self._device = device
        self._bound = TransformersVariant()
        self._parameters: dict[nn.Module, dict[str, Tensor]] = defaultdict(dict)  # of modules to be copied
        self._taken: list[Tensor] = []

    def bind(self, terms: VariantTerms) -> TransformersVariant:
        for name, of_linear in terms.linears.items():
            self._bind_linear(name, of_linear)
        for name, of_embedding in terms.embeddings.items():
            self._bind_embedding(name, of_embedding)
        for parameter, of_experts in terms.experts.items():
            self._bind_experts(parameter, of_experts)
        for parameter, vector in terms.vectors.items():
            path, _, name = parameter.rpartition(".")
            self._replace(path, name, vector)
        for module, parameters in self._parameters.items():
            self._bound.modules[module] = with_parameters(module, parameters)
        self._bound.num_bytes += sum(tensor.nbytes for tensor in self._taken)
        return self._bound

    def _bind_linear(self, path: str, terms: LinearTerms) -> None:
        module = self._causal_lm.get_submodule(path)
        if not isinstance(module, Linear):  # a router
            bias = module._parameters.get("bias")
            weight, new_bias = merge_linear(
                module.weight.float().cpu(), None if bias is None else bias.float().cpu(), terms
            )
            self._replace(path, "weight", weight)
            if new_bias is not None:
                self._replace(path, "bias", new_bias)
            return
        axes = self._axes.get(module)
        if axes is None or not axes.rows_lead:
            raise _refusal(path, module)
        self._bound.linears[module] = self._moved(terms, module.in_features, axes.dtype)
        if terms.extra_rows is not None:
            self._bound.extra_head = ExtraHead(
                self._take(terms.extra_rows, axes.dtype), self._take(terms.extra_bias, axes.dtype)
            )

    def _bind_embedding(self, path: str, terms: EmbeddingTerms) -> None:
        module = self._causal_lm.get_submodule(path)
        plain = type(module).forward is nn.Embedding.forward or module is self._causal_lm.get_input_embeddings()
        if module not in self._axes or not plain:
            raise _refusal(path, module)
        dtype = module.weight.dtype
        token_ids, rows = given_rows(terms, module.num_embeddings)
        self._bound.embeddings[module] = EmbeddingTerms(
            token_ids=self._take(token_ids, torch.int64),
            rows=self._take(rows, dtype),
            a=self._take(None if terms.a is None else terms.a.T, dtype),
            b=self._take(terms.b, dtype),
            signs=tuple(map(self._moved_plane, terms.signs)),
        )

    def _bind_experts(self, parameter: str, terms: Mapping[int, LinearTerms]) -> None:
        path, _, name = parameter.rpartition(".")
        module = self._causal_lm.get_submodule(path)
        if not VariantExperts.knows(module) or name not in EXPERT_PARAMETERS:
            raise _refusal(path, module)
        weights: Tensor = getattr(module, name)
        num_inputs = weights.shape[1 if module.is_transposed else 2]
        moved = {expert: self._moved(of_expert, num_inputs, weights.dtype) for expert, of_expert in terms.items()}
        others = self._bound.experts.get(module, ExpertsTerms({}, {}))
        changed = others._replace(down=moved) if name == "down_proj" else others._replace(up=moved)
        self._bound.experts[module] = changed

    def _replace(self, path: str, name: str, tensor: Tensor) -> None:
        module = self._causal_lm.get_submodule(path)
        own = module._parameters.get(name)
        if own is None or module not in self._axes or isinstance(module, (Linear, nn.Embedding)):
            raise _refusal(f"{path}.{name}", module)
        self._parameters[module][name] = self._take(tensor, own.dtype)

    def _moved(self, terms: LinearTerms, num_inputs: int, dtype: torch.dtype) -> BoundLinear:
        signs = tuple(SignMatrix(plane, num_inputs, dtype=dtype, device=self._device) for plane in terms.signs)
        self._bound.num_bytes += sum(plane.num_bytes for plane in signs)
        moved = LinearTerms(
            a=self._take(terms.a, dtype),
            b=self._take(terms.b, dtype),
            output_scale=self._take(terms.output_scale, torch.float32),
            input_scale=self._take(terms.input_scale, torch.float32),
            dense=self._take(terms.dense, dtype),
            sparse=self._moved_sparse(terms.sparse, dtype),
            bias=self._take(terms.bias, torch.float32),
        )
        return BoundLinear(moved, signs)

    def _moved_sparse(self, matrix: SparseMatrix | None, dtype: torch.dtype) -> SparseMatrix | None:
        if matrix is None:
            return None
        return SparseMatrix(
            self._take(matrix.row_starts, torch.int64),
            self._take(matrix.columns, torch.int32),
            self._take(matrix.values, dtype),
        )

    def _moved_plane(self, plane: SignPlane) -> SignPlane:
        return SignPlane(
            self._take(plane.bits, torch.uint8),
            self._take(plane.row_scale, torch.float32),
            self._take(plane.column_scale, torch.float32),
        )

    @overload
    def _take(self, tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
    @overload
    def _take(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
    def _take(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if tensor is None:
            return None
        taken = tensor.to(self._device, dtype).contiguous()
        if taken.untyped_storage().nbytes() > taken.nbytes:  # a part of a file's content, whose rest nobody needs
            taken = taken.clone()
        self._taken.append(taken)
        return taken


def _refusal(path: str, module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The adapter changes {path}, but {type(module).__name__} cannot be computed with other weights for some of a "
        "batch's rows; train the adapter without it."
    )


def _variants(segments: VariantSegments) -> list[tuple[slice, TransformersVariant]]:
    return [(slice(start, end), cast(TransformersVariant, variant)) for start, end, variant in segments]


def _by_module(
    parts: Iterable[tuple[slice, Mapping[_Module, _Terms]]],
) -> dict[_Module, list[tuple[slice, _Terms]]]:
    """The rows and terms of each module that has some."""
    found: dict[_Module, list[tuple[slice, _Terms]]] = defaultdict(list)
    for segment, of_variant in parts:
        for module, terms in of_variant.items():
            found[module].append((segment, terms))
    return found
