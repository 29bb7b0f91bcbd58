"""Variants in the native decoder: where their terms go, and the operations that apply them.

terms by module name ──bind──► terms of each fused layer, by its index ──► PackedVariant
operations of the plain program ──with_variants──► the same over the same buffers, with a Shrink before each product
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from model_worker.engine.layers.extra_head import ExtraHead
from model_worker.engine.lora.bound_variant import VariantSegments
from model_worker.engine.models.decoder_fusions import Fusion
from model_worker.engine.ops.cpu.program import Operation
from model_worker.engine.ops.cpu.step_variants import PackedLinear, PackedSegment, PackedVariant, StepVariants
from model_worker.engine.ops.embedding import Embedding
from model_worker.engine.ops.experts import ExpertLinear
from model_worker.engine.ops.linear import Linear, QuantizeRows
from model_worker.engine.ops.lora import AddEmbedding, ExpertRows, Shrink
from model_worker.engine.ops.lora.packing import LinearLayer, LinearPacker, LinearPart, pack_embedding
from model_worker.engine.ops.rms_norm import RMSNorm
from model_worker.engine.ops.sign_planes.packed_signs import PackedSigns
from model_worker.engine.ops.sign_planes.packing import SignPart, pack_signs
from registry.errors import UnsupportedModelError

_OTHERWISE = "serve the model with --model-impl transformers."


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a parameter of the checkpoint in the decoder.

    Attributes:
        fusion: that it is a part of.
        part: which one.
    """

    fusion: Fusion
    part: int


class NativeVariants:
    """The places of a decoder where variants can change something.

    Args:
        fusions: all that the decoder consists of, in order.
        shapes: of the checkpoint's parameters.
        dtype: of weights that are not quantized.
        embedding, head: names of these parameters; the head may be the embedding.
        num_threads: of the decoder's team.
    """

    def __init__(
        self,
        fusions: Sequence[Fusion],
        shapes: Mapping[str, torch.Size],
        *,
        dtype: torch.dtype,
        embedding: str,
        head: str,
        num_threads: int,
    ) -> None:
        self._num_threads = num_threads
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        # Float32 weights are served for exactness; others are rounded themselves, to no more digits than these.
        self._dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._packer = LinearPacker(self._dtype)
        self._embedding, self._head = embedding, head
        self._places = {name: _Place(fusion, part) for fusion in fusions for part, name in enumerate(fusion.names)}
        if head not in self._places:
            self._places[head] = _Place(Fusion("head", (head,)), 0)
            self._shapes[head] = tuple(shapes[embedding])
        self._fusions = {place.fusion.key: place.fusion for place in self._places.values()}
        self._linears: dict[str, int] = {}  # index of each fused layer; of experts, of the first
        self._norms: dict[str, int] = {}
        self._num_linears = 0
        for key, fusion in self._fusions.items():
            if len(self._shapes[fusion.names[0]]) == 1:
                if not key.endswith(".bias"):
                    self._norms[key] = len(self._norms)
            elif embedding not in fusion.names:
                self._linears[key] = self._num_linears
                self._num_linears += fusion.num_experts or 1

    def bind(self, terms: VariantTerms) -> PackedVariant:
        """See `VariantHost.bind`."""
        parts: dict[str, dict[int, LinearTerms]] = {}  # by the fused layer and the part
        for module, linear in terms.linears.items():
            place = self._place(f"{module}.weight", self._linears)
            parts.setdefault(place.fusion.key, {})[place.part] = linear
        layers = {}
        for key, of_layer in parts.items():
            layers[self._linears[key]] = self._layer(self._fusions[key], of_layer)
        for name, experts in terms.experts.items():
            fusion = self._place(name, self._linears).fusion
            assert fusion.num_experts is not None
            for expert, linear in experts.items():
                layers[self._linears[fusion.key] + expert] = self._layer(fusion, {0: linear})
        linears = dict(zip(layers, self._packer.pack(list(layers.values())), strict=True))
        norms = {}
        for name, vector in terms.vectors.items():
            fusion = self._place(name, self._norms).fusion
            norms[self._norms[fusion.key]] = vector.float() + fusion.offset
        embedding = None
        for module, of_embedding in terms.embeddings.items():
            if f"{module}.weight" != self._embedding:
                raise UnsupportedModelError(f"The native decoder has no embedding {module!r}; {_OTHERWISE}")
            signs = self._embedding_signs(of_embedding, terms.linears, linears)
            num_rows = self._shapes[self._embedding][0]
            embedding = replace(pack_embedding(of_embedding, num_rows, dtype=self._dtype), signs=signs)
        return PackedVariant(
            linears,
            norms,
            embedding,
            self._extra_head(terms.linears),
            num_linears=self._num_linears,
            num_norms=len(self._norms),
        )

    def plan(
        self, segments: VariantSegments, *, first_row: int, num_rows: int, rows_per_token: int = 1
    ) -> StepVariants | None:
        """The plan of a step of rows [first_row, first_row + num_rows); None: all of them are the base's.

        Args:
            segments: of all rows, whose variants this decoder has bound.
            rows_per_token: most rows that an operation has for each row of the step.
        """
        end_row = first_row + num_rows
        packed = []
        for start, end, variant in segments:
            if start < end_row and end > first_row:
                assert isinstance(variant, PackedVariant)
                packed.append(PackedSegment(max(start, first_row) - first_row, min(end, end_row) - first_row, variant))
        return StepVariants(packed, num_rows * rows_per_token, self._num_threads) if packed else None

    def with_variants(self, operations: Iterable[Operation]) -> Iterator[Operation]:
        """A program's operations with those of variants among them, over the same buffers."""
        quantize: QuantizeRows | None = None  # comes right before the product that it is for, and after its Shrink
        for operation in operations:
            if isinstance(operation, QuantizeRows):
                quantize = operation
                continue
            if isinstance(operation, Linear | ExpertLinear):
                index = self._linears[operation.name]
                experts = None
                if isinstance(operation, ExpertLinear):
                    experts = ExpertRows(operation.plan.starts, operation.plan.tokens)
                yield Shrink(f"{operation.name}.shrink", operation.x, index, experts)
                if quantize is not None:
                    yield quantize
                    quantize = None
                yield replace(operation, terms=index)
            elif isinstance(operation, RMSNorm):
                yield replace(operation, index=self._norms[operation.name])
            else:
                yield operation
                if isinstance(operation, Embedding):
                    yield AddEmbedding(f"{operation.name}.add", operation.out, operation.multiplier)

    def _layer(self, fusion: Fusion, terms: Mapping[int, LinearTerms]) -> LinearLayer:
        """Terms of a fused layer, or of one expert, from those of its parts."""
        for linear in terms.values():
            if linear.input_scale is None:
                continue
            if linear.a is not None or linear.dense is not None or linear.sparse is not None or linear.signs:
                raise UnsupportedModelError(f"{fusion.key} has an input scale beside other products; {_OTHERWISE}")
            if fusion.num_experts is None and not fusion.key.endswith((".output", ".down")):
                raise UnsupportedModelError(
                    f"The input of {fusion.key}, to be scaled, is others' input too; {_OTHERWISE}"
                )
        parts = (
            LinearPart(self._shapes[name][-2], terms.get(part, LinearTerms())) for part, name in enumerate(fusion.names)
        )
        return LinearLayer(tuple(parts), fusion.gated)

    def _extra_head(self, linears: Mapping[str, LinearTerms]) -> ExtraHead | None:
        """In float32, as the hidden states are."""
        extra = {module: linear for module, linear in linears.items() if linear.extra_rows is not None}
        of_head = extra.pop(self._head.removesuffix(".weight"), None)
        assert not extra, "only the head has rows of its own for a variant"
        if of_head is None or of_head.extra_rows is None:
            return None
        assert of_head.extra_bias is None, "the native decoder has no head with a bias"
        return ExtraHead(of_head.extra_rows.to(torch.float32, copy=True))

    def _embedding_signs(
        self, terms: EmbeddingTerms, linears: Mapping[str, LinearTerms], packed: Mapping[int, PackedLinear]
    ) -> PackedSigns | None:
        """The planes of the embedding; where the head has the same ones, those that are packed for it."""
        of_head = linears.get(self._head.removesuffix(".weight"))
        if of_head is not None and of_head.signs == terms.signs:
            return packed[self._linears[self._places[self._head].fusion.key]].signs
        return pack_signs([SignPart(self._shapes[self._embedding][0], terms.signs)], gated=False)

    def _place(self, name: str, known: Mapping[str, int]) -> _Place:
        place = self._places.get(name)
        if place is None or place.fusion.key not in known:
            raise UnsupportedModelError(f"The native decoder has no place for changes of {name}; {_OTHERWISE}")
        return place
