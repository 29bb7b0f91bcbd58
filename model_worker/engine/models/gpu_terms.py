"""Putting the terms of one variant into the form and the memory in which the GPU decoder computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from delta.extra_tokens import given_rows
from delta.variant_terms import EmbeddingTerms, LinearTerms, SignPlane, SparseMatrix, VariantTerms
from model_worker.engine.layers.bound_terms import BoundTerms, FusedTerms
from model_worker.engine.layers.extra_head import ExtraHead
from model_worker.engine.layers.fused_linear import FusedLinear
from model_worker.engine.layers.rms_norm import RMSNorm
from model_worker.engine.layers.token_embedding import TokenEmbedding
from model_worker.engine.layers.variants import BoundLinear, ExpertsTerms
from model_worker.engine.models.gpu_mixture import DecoderExperts
from model_worker.engine.models.gpu_weights import WeightPlace
from model_worker.engine.ops.low_rank import Factors
from model_worker.engine.ops.sign_matmul import SignMatrix
from registry.errors import UnsupportedModelError

_ARRANGED_ROWS = 4096  # at a time: it takes several times their memory
_OTHERWISE = "serve the model with --model-impl transformers."


class TermBinder:
    """Binds one variant.

    Args:
        places: of the checkpoint's parameters, and of the head where it is tied.
        device: of the decoder.
        dtype: of its activations.
        has_bits: signs are bits, for kernels.
        stream: that copies are made on; None: where everything is computed.

    Attributes:
        extra_head: for tokens that the base does not have.
        num_bytes: that were taken.
    """

    def __init__(
        self,
        places: Mapping[str, WeightPlace],
        device: torch.device,
        *,
        dtype: torch.dtype,
        has_bits: bool,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._places = places
        self._device = device
        self._dtype = dtype
        self._has_bits = has_bits
        self._stream = stream
        self.extra_head: ExtraHead | None = None
        self.num_bytes = 0
        if stream is not None:
            # Steps with whoever had the variant's number before are done when its rows of tables are written.
            stream.wait_stream(torch.cuda.current_stream(device))

    def bind(self, terms: VariantTerms) -> BoundTerms:
        """Terms on the device; on a GPU, when its copies are done.

        Raises:
            UnsupportedModelError: there is no place for one of them.
        """
        parts: dict[FusedLinear, dict[int, LinearTerms]] = {}
        for module, linear in terms.linears.items():
            place = self._place(f"{module}.weight")
            if place.linear is None:
                raise _refusal(module)
            if linear.extra_rows is not None:
                self.extra_head = self._extra_head(place.linear, linear.extra_rows)
            parts.setdefault(place.linear, {})[place.part] = linear
        bound = BoundTerms()
        for layer, of_parts in parts.items():
            bound.linears[layer.key] = self._fused(layer, of_parts)
        for name, of_experts in terms.experts.items():
            self._bind_experts(name, of_experts, bound)
        self._bind_norms(terms.vectors, bound)
        for module, embedding in terms.embeddings.items():
            place = self._place(f"{module}.weight")
            if not isinstance(place.module, TokenEmbedding):
                raise _refusal(module)
            bound.embedding = self._embedding(embedding, place.module)
        return bound

    def copy(self, source: Tensor, target: Tensor) -> None:
        """To memory of the device, in the order of the variant's other copies."""
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source.contiguous().pin_memory().to(self._device, non_blocking=True))

    def finish(self) -> torch.cuda.Event | None:
        """The end of all copies."""
        return None if self._stream is None else self._stream.record_event()

    # ------------------------------------------------------------------------------------------ terms

    def _fused(self, layer: FusedLinear, parts: Mapping[int, LinearTerms]) -> FusedTerms:
        terms = [parts.get(part, LinearTerms()) for part in range(len(layer.widths))]
        input_scale = terms[0].input_scale
        if len(terms) > 1 and any(each.input_scale is not None for each in terms):
            raise UnsupportedModelError(f"The input of {layer.key}, to be scaled, is others' input too; {_OTHERWISE}")
        scale, shift = _scale_and_shift(layer, terms)
        return FusedTerms(
            factors=tuple(self._factors(each) for each in terms),
            planes=tuple(tuple(self._plane(plane, layer.in_features) for plane in each.signs) for each in terms),
            dense=tuple(self._take(each.dense, self._dtype) for each in terms),
            sparse=tuple(self._sparse(each.sparse) for each in terms),
            input_scale=self._take(input_scale, torch.float32),
            scale=self._take(scale, torch.float32),
            shift=self._take(shift, torch.float32),
        )

    def _factors(self, terms: LinearTerms) -> Factors | None:
        if terms.a is None or terms.b is None or not terms.rank:
            return None
        return Factors(self._take(terms.a, self._dtype), self._take(terms.b, self._dtype))

    def _plane(self, plane: SignPlane, num_inputs: int) -> SignMatrix:
        return SignMatrix(
            plane, num_inputs, dtype=self._dtype, device=self._device, has_bits=self._has_bits, move=self._moved
        )

    def _sparse(self, matrix: SparseMatrix | None) -> SparseMatrix | None:
        if matrix is None:
            return None
        return SparseMatrix(
            self._take(matrix.row_starts, torch.int64),
            self._take(matrix.columns, torch.int32),
            self._take(matrix.values, self._dtype),
        )

    def _bind_experts(self, name: str, terms: Mapping[int, LinearTerms], bound: BoundTerms) -> None:
        """Of one parameter [E, N, K]."""
        place = self._place(name)
        if not isinstance(place.module, DecoderExperts):
            raise _refusal(name)
        num_inputs = place.parameter.shape[-1]
        of_each = {expert: self._expert(of_expert, num_inputs) for expert, of_expert in terms.items()}
        others = bound.experts.get(place.module.key, ExpertsTerms({}, {}))
        is_down = place.attribute == "down_proj"
        bound.experts[place.module.key] = others._replace(down=of_each) if is_down else others._replace(up=of_each)

    def _expert(self, terms: LinearTerms, num_inputs: int) -> BoundLinear:
        """Not for tables: `VariantExperts` passes all that is needed to each product."""
        signs = tuple(
            SignMatrix(plane, num_inputs, dtype=self._dtype, device=self._device, move=self._moved)
            for plane in terms.signs
        )
        moved = replace(
            terms,
            a=self._take(terms.a, self._dtype),
            b=self._take(terms.b, self._dtype),
            dense=self._take(terms.dense, self._dtype),
            sparse=self._sparse(terms.sparse),
            bias=self._take(terms.bias, torch.float32),
            input_scale=self._take(terms.input_scale, torch.float32),
            output_scale=self._take(terms.output_scale, torch.float32),
            signs=(),
        )
        return BoundLinear(moved, signs)

    def _bind_norms(self, vectors: Mapping[str, Tensor], bound: BoundTerms) -> None:
        """A norm of several of the checkpoint's gets those that the variant has in place of its own."""
        changed: dict[RMSNorm, Tensor] = {}
        for name, vector in vectors.items():
            place = self._place(name)
            if not isinstance(place.module, RMSNorm):
                raise _refusal(name)
            if place.module not in changed:
                changed[place.module] = place.parameter.detach().cpu().clone()
            rows = changed[place.module][place.first : place.first + place.num_rows * place.repeats]
            rows.copy_(place.converted(vector))
        for norm, weight in changed.items():
            bound.norms[norm.key] = self._take(weight, weight.dtype)

    def _embedding(self, terms: EmbeddingTerms, embedding: TokenEmbedding) -> EmbeddingTerms:
        token_ids, rows = given_rows(terms, len(embedding.weight))
        return EmbeddingTerms(
            token_ids=self._take(token_ids, torch.int64),
            rows=self._take(rows, self._dtype),
            a=self._take(None if terms.a is None else terms.a.T, self._dtype),
            b=self._take(terms.b, self._dtype),
            signs=tuple(
                SignPlane(
                    self._take(plane.bits, torch.uint8),
                    self._take(plane.row_scale, torch.float32),
                    self._take(self._column_scale(plane, embedding.embedding_dim), torch.float32),
                )
                for plane in terms.signs
            ),
        )

    def _column_scale(self, plane: SignPlane, size: int) -> Tensor | None:
        """Kernels want one."""
        return torch.ones(size) if plane.column_scale is None and self._has_bits else plane.column_scale

    def _extra_head(self, layer: FusedLinear, rows: Tensor) -> ExtraHead:
        if layer.key != "head":
            raise _refusal(layer.key)
        return ExtraHead(self._take(rows, self._dtype))

    def _place(self, name: str) -> WeightPlace:
        place = self._places.get(name)
        if place is None:
            raise _refusal(name)
        return place

    # ------------------------------------------------------------------------------------------ memory

    @overload
    def _take(self, tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
    @overload
    def _take(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
    def _take(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if tensor is None else self._moved(tensor.to(dtype))

    def _moved(self, tensor: Tensor, arranged: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """A copy on the device that belongs to the variant, of the tensor or of what `arranged` makes of it there.

        Args:
            arranged: makes of each row of the tensor one of its own; called with some of them at a time.
        """
        if self._stream is None:
            there = tensor.to(self._device)
            moved = there.clone(memory_format=torch.contiguous_format) if arranged is None else arranged(there)
        else:
            source = tensor.contiguous() if tensor.is_cuda else tensor.contiguous().pin_memory()
            wanted = source if arranged is None else arranged(source.to("meta"))
            moved = torch.empty(wanted.shape, dtype=wanted.dtype, device=self._device)
            for each in (source, moved) if source.is_cuda else (moved,):
                each.record_stream(self._stream)
            # It may be memory that a step under way has given back but not done with.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                if arranged is None:
                    moved.copy_(source, non_blocking=True)
                else:
                    pieces = torch.split(source, _ARRANGED_ROWS), torch.split(moved, _ARRANGED_ROWS)
                    for rows, there in zip(*pieces, strict=True):
                        there.copy_(arranged(rows.to(self._device, non_blocking=True)))
        self.num_bytes += moved.nbytes
        return moved


def _scale_and_shift(layer: FusedLinear, parts: list[LinearTerms]) -> tuple[Tensor | None, Tensor | None]:
    """e and f of a fused layer, see `row_terms`."""
    if all(terms.output_scale is None and terms.bias is None for terms in parts):
        return None, None
    scales, biases = [], []
    for width, terms in zip(layer.widths, parts, strict=True):
        scales.append(torch.ones(width) if terms.output_scale is None else terms.output_scale.float())
        biases.append(torch.zeros(width) if terms.bias is None else terms.bias.float())
    scale, shift = torch.cat(scales), torch.cat(biases)
    if all(terms.output_scale is None for terms in parts):
        return None, shift
    if layer.bias is not None:
        base = layer.bias.detach().float().cpu()
        shift = shift + base - scale * base
    return scale, shift


def _refusal(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"The native decoder for GPUs has no place for changes of {name}; {_OTHERWISE}")
