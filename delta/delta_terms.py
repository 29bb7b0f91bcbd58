"""Read a delta artifact into terms, to serve its fine-tune beside the base. Format: docs/formats/delta.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from delta.artifact import Delta, open_delta
from delta.codecs.codec import Term
from delta.codecs.registry import DIFFERENCE_CODECS, WHOLE_CODECS
from delta.delta_config import ROWS, DeltaTensor
from delta.extra_tokens import check_extra_rows
from delta.linear_terms import add_up, block_of_rows, stacked, transposed
from delta.parameter_places import Place, find_place
from delta.peft.adapter_files import all_finite
from delta.peft.base_model import BaseModel
from delta.peft.terms_builder import TermsBuilder
from delta.reconstruct import reconstruct
from delta.tensor_digest import tensor_digest
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from registry.errors import CheckpointError, UnsupportedModelError


def read_delta(directory: Path, base: BaseModel) -> VariantTerms:
    """Read a delta that was made from `base`; any thread may call this.

    Every stored tensor is compared with its digest and used exactly once. Terms that add stay what they are; a matrix
    that is stored whole becomes e = 0 and Z = W'.

    Raises:
        CheckpointError: missing, damaged or contradictory files, values that are not finite, or another base.
        UnsupportedModelError: a fine-tune that can only be served applied; the message says how.
    """
    with open_delta(directory) as delta:
        reader = _Reader(delta, base)
        reader.check()
        terms = reader.read()
    if terms.num_modules == 0:
        raise UnsupportedModelError(f"{directory} changes no weight, so that it is served as its base")
    if not all(all_finite(tensor) for tensor in terms.tensors()):
        raise CheckpointError(f"{directory} holds values that are not finite; train the fine-tune again")
    return terms


class _Reader:
    """One reading of one delta."""

    def __init__(self, delta: Delta, base: BaseModel) -> None:
        self._delta = delta
        self._base = base
        self._builder = TermsBuilder(delta.path)
        # Of mixtures that are stored expert by expert: blocks of rows by parameter and expert, and by the first row.
        self._blocks: dict[tuple[str, int], dict[int, LinearTerms]] = {}

    def check(self) -> None:
        """Everything that can be said without reading data."""
        config, digest = self._delta.config, self._base.digest
        if digest is not None and digest != config.base.digest:
            raise CheckpointError(
                f"{self._delta.path} was made from the base {config.base.name} ({config.base.digest}), but this one is "
                f"{digest}; serve it with its own base"
            )
        for name, entry in config.tensors.items():
            place = self._place(name)
            num_given = sum(
                math.prod(part.shape[:1]) for term in entry.terms if term.codec == ROWS for part in term.parts.values()
            )
            if self._has_extra_rows(place, entry) and num_given in (0, entry.shape[0] - place.shape[0]):
                continue
            if place.shape[1:] == entry.shape[1:] and (place.shape != entry.shape or num_given):
                raise self._unsupported(f"{name} has {entry.shape[0]} rows, the base {place.shape[0]}")
            if entry.shape != place.shape:
                raise CheckpointError(
                    f"{self._delta.path}: {name} is {list(entry.shape)}, but {list(place.shape)} in this base; serve "
                    "it with its own base"
                )
        for name, other in config.tied.items():
            head, table = self._place(name), self._place(other)
            if self._base.shapes.tied.get(head.name) != table.name:
                raise self._unsupported(f"{name} is tied to {other}, which it is not in the base")

    def read(self) -> VariantTerms:
        for name, entry in self._delta.config.tensors.items():
            place = self._place(name)
            if not self._follows_its_table(name, place):
                self._read_tensor(place, entry, self._delta.read_terms(name))
        self._put_blocks_together()
        terms = self._builder.build(self._delta.digest)
        check_extra_rows(terms, self._base.shapes, self._delta.path)
        return terms

    def _has_extra_rows(self, place: Place, entry: DeltaTensor) -> bool:
        """Those of tokens that the base does not have."""
        shapes = self._base.shapes
        if place.name != (shapes.input_embedding if place.kind == "embedding" else shapes.output_head):
            return False
        return not place.transposed and place.shape[1:] == entry.shape[1:] and place.shape[0] < entry.shape[0]

    def _read_tensor(self, place: Place, entry: DeltaTensor, terms: Sequence[Term]) -> None:
        if place.kind == "vector":
            self._builder.add_vector(place.name, reconstruct(None, terms, entry.torch_dtype, entry.shape))
        elif place.kind == "bias":
            self._read_bias(place, reconstruct(None, terms, entry.torch_dtype, entry.shape).float())
        elif place.kind == "experts":
            self._read_experts(place, entry, terms)
        elif place.expert is not None:
            self._blocks.setdefault((place.name, place.expert), {})[place.first_row] = self._linear(place, entry, terms)
        elif place.kind == "linear":
            self._add_linear(place.name, self._linear(place, entry, terms))
        else:
            self._read_embedding(place, entry, terms)

    def _read_bias(self, place: Place, bias: Tensor) -> None:
        bias, extra = _split(bias, place.shape[0])
        has_bias = self._base.shapes.linears[place.name].has_bias
        self._builder.add_linear(place.name, bias=bias - self._base.bias(place.name) if has_bias else bias)
        if extra is not None:
            self._builder.add_linear(place.name, extra_bias=extra)

    def _read_embedding(self, place: Place, entry: DeltaTensor, terms: Sequence[Term]) -> None:
        differences, extra = _without_rows(terms)
        of_heads = None
        if all(term.codec in DIFFERENCE_CODECS for term in differences):
            of_heads = _differences(differences, place.shape)
        if of_heads is not None and of_heads.dense is None and of_heads.sparse is None:
            a, b = of_heads.a, of_heads.b
            # Of the table D = B A, of an embedding's terms D = (B A)ᵀ.
            swapped = {} if a is None or b is None else {"a": b.T.contiguous(), "b": a.T.contiguous()}
            self._builder.add_embedding(place.name, EmbeddingTerms(signs=of_heads.signs, extra_rows=extra, **swapped))
        else:
            table, extra = _split(self._given_back(place, entry, terms), place.shape[0])
            before = self._base.weight(place.name).to(table.dtype)
            token_ids = (table != before).any(dim=1).nonzero().flatten()
            self._builder.add_embedding(
                place.name, EmbeddingTerms(token_ids=token_ids, rows=table[token_ids], extra_rows=extra)
            )
            if of_heads is None:
                of_heads = LinearTerms(output_scale=torch.zeros(len(table)), dense=table)
        for head in self._heads(place.name):
            self._add_linear(head, replace(of_heads, extra_rows=extra))

    def _heads(self, embedding: str) -> list[str]:
        """Output heads that compute with this table, and have no change of their own."""
        config, shapes = self._delta.config, self._base.shapes
        tied = [head for head, of in shapes.tied.items() if of == embedding]
        tied += [self._place(name).name for name, of in config.dropped.items() if self._place(of).name == embedding]
        untied = {self._place(name).name for name in config.tensors if name not in config.base.tensors}
        return [head for head in dict.fromkeys(tied) if head not in untied]

    def _follows_its_table(self, name: str, place: Place) -> bool:
        """The base stores a tied head by itself, and the fine-tune still ties it."""
        config, shapes = self._delta.config, self._base.shapes
        if place.kind != "linear" or place.name not in shapes.tied or name not in config.base.tensors:
            return False
        digests = config.result_tensors()
        tables = [table for table in digests if self._is_table(table, shapes.tied[place.name])]
        if [digests[table] for table in tables] != [digests[name]]:
            raise self._unsupported(f"{name} differs from the embedding that it is tied to in the base")
        return True

    def _is_table(self, name: str, embedding: str) -> bool:
        place = find_place(name, self._base.shapes)
        return place is not None and place.kind == "embedding" and place.name == embedding

    def _linear(self, place: Place, entry: DeltaTensor, terms: Sequence[Term]) -> LinearTerms:
        if any(term.codec in WHOLE_CODECS for term in terms):
            weight, extra = _split(self._given_back(place, entry, terms), place.shape[0])
            weight = weight.T.contiguous() if place.transposed else weight
            return LinearTerms(output_scale=torch.zeros(len(weight)), dense=weight, extra_rows=extra)
        differences, extra = _without_rows(terms)
        stored = _differences(differences, place.shape)
        return transposed(stored, place.shape[-1]) if place.transposed else replace(stored, extra_rows=extra)

    def _read_experts(self, place: Place, entry: DeltaTensor, terms: Sequence[Term]) -> None:
        num_experts, num_rows, num_columns = entry.shape
        whole = None
        if any(term.codec in WHOLE_CODECS for term in terms):
            whole = self._given_back(place, entry, terms)
        stored = LinearTerms() if whole is not None else _differences(terms, entry.shape)
        for index in range(num_experts):
            if whole is not None:
                weight = whole[index].T.contiguous() if place.transposed else whole[index]
                of_expert = LinearTerms(output_scale=torch.zeros(len(weight)), dense=weight)
            else:
                of_expert = block_of_rows(stored, slice(index * num_rows, (index + 1) * num_rows))
                of_expert = transposed(of_expert, num_columns) if place.transposed else of_expert
            self._builder.add_expert(place.name, index, of_expert)

    def _put_blocks_together(self) -> None:
        for (parameter, expert), blocks in self._blocks.items():
            shape = self._base.shapes.experts[parameter]
            if not shape.gate_and_up:
                self._builder.add_expert(parameter, expert, blocks[0])
                continue
            num_rows = shape.out_features // 2
            halves = [(num_rows, blocks.get(start, LinearTerms())) for start in (0, num_rows)]
            self._builder.add_expert(parameter, expert, stacked(halves, shape.in_features))

    def _given_back(self, place: Place, entry: DeltaTensor, terms: Sequence[Term]) -> Tensor:
        """W', as the checkpoint stores it."""
        base = None
        if any(term.codec != "replace" for term in terms):
            base = self._weight(place if entry.base is None else self._place(entry.base), entry.torch_dtype)
        weight = reconstruct(base, terms, entry.torch_dtype, entry.shape)
        if any(term.codec in WHOLE_CODECS for term in terms) and tensor_digest(weight) != entry.digest:
            raise self._unsupported(
                f"{place.name} is stored as what changed in the bits of the base's, which this server has rounded"
            )
        return weight

    def _weight(self, place: Place, dtype: torch.dtype) -> Tensor:
        """The base's, as a checkpoint stores it: of experts, which are many, in the type that is wanted."""
        if place.expert is not None:
            weight = self._base.weight(f"{place.name}.{place.expert}")
            return weight[place.first_row : place.first_row + place.shape[0]]
        if place.kind != "experts":
            weight = self._base.weight(place.name)
            return weight.T if place.transposed else weight
        weights = torch.empty(place.shape, dtype=dtype)
        for index, stored in enumerate(weights):
            weight = self._base.weight(f"{place.name}.{index}")
            stored.copy_(weight.T if place.transposed else weight)
        return weights

    def _add_linear(self, module: str, terms: LinearTerms) -> None:
        names = ("a", "b", "output_scale", "dense", "signs", "sparse", "extra_rows")
        given = {name: getattr(terms, name) for name in names}
        self._builder.add_linear(module, **{name: value for name, value in given.items() if value is not None})

    def _place(self, name: str) -> Place:
        place = find_place(name, self._base.shapes)
        if place is None:
            raise self._unsupported(f"the base as it is served has no parameter {name}")
        return place

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        remedy = "write it out with python -m delta apply, and serve that"
        if not self._delta.config.misfits:
            remedy = f"start a worker with --apply-delta {self._delta.path}, or {remedy}"
        return UnsupportedModelError(f"{self._delta.path} cannot be served beside its base: {reason}; {remedy}")


def _without_rows(terms: Sequence[Term]) -> tuple[Sequence[Term], Tensor | None]:
    """The terms of the rows that the base has, and the rows that it does not have, if they are a term of their own."""
    if not terms or terms[-1].codec != ROWS:
        return terms, None
    return terms[:-1], terms[-1].parts[ROWS]


def _split(rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """The first `num_rows`, and the others, if there are any."""
    return (rows, None) if len(rows) == num_rows else (rows[:num_rows], rows[num_rows:])


def _differences(terms: Sequence[Term], shape: tuple[int, ...]) -> LinearTerms:
    """Of the matrix [numel / columns, columns]."""
    matrix = (math.prod(shape[:-1]), shape[-1])
    return add_up([DIFFERENCE_CODECS[term.codec].terms(term.parts, matrix) for term in terms], shape[-1])
