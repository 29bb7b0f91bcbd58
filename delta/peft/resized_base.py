"""Adapters that were trained on their base with more tokens: its embedding and its head were resized before.

    base [V, .] ──ResizedBase──► [V + E, .] ──the readers──► terms of V + E rows ──split──► terms of V, and E extra rows

What the resized base had in its new rows is in the file where it holds copies of the base's tables, or does not matter,
because the adapter replaces these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from delta.merge_terms import merge_embedding, merge_linear
from delta.peft.adapter_config import Ia3Config, LoraConfig
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import BaseModel, ModelShapes
from delta.peft.targets import in_saved_module
from delta.variant_terms import EmbeddingTerms, LinearTerms, VariantTerms
from registry.errors import UnsupportedModelError

COPIES = ("base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight", "weight")
"""Names below a module under which PEFT stores the base's table, resized; `weight` is the new one of a saved module."""


class ResizedBase:
    """A `BaseModel` with more tokens than the one that is served.

    Args:
        num_extra: of them.
        rows: of the input embedding and the output head, [num_extra, width] float32 each.
    """

    def __init__(self, base: BaseModel, num_extra: int, rows: Mapping[str, Tensor]) -> None:
        self._base = base
        self._num_extra = num_extra
        self._rows = rows
        self.digest = base.digest
        shapes = base.shapes
        head, embedding = shapes.linears[shapes.output_head], shapes.embeddings[shapes.input_embedding]
        larger_head = replace(head, out_features=head.out_features + num_extra)
        self.shapes: ModelShapes = replace(
            shapes,
            linears={**shapes.linears, shapes.output_head: larger_head},
            embeddings={**shapes.embeddings, shapes.input_embedding: (embedding[0] + num_extra, embedding[1])},
        )

    def weight(self, module: str) -> Tensor:
        weight = self._base.weight(module)
        return torch.cat([weight, self._rows[module]]) if module in self._rows else weight

    def bias(self, module: str) -> Tensor:
        bias = self._base.bias(module)
        return torch.cat([bias, bias.new_zeros(self._num_extra)]) if module in self._rows else bias

    def split(self, terms: VariantTerms) -> VariantTerms:
        """The same for the base that is served: what is beyond its rows becomes extra rows."""
        shapes = self._base.shapes
        head, embedding = shapes.output_head, shapes.input_embedding
        of_head = _split_linear(terms.linears.get(head, LinearTerms()), self._rows[head], shapes.linears[head].has_bias)
        of_embedding = _split_embedding(
            terms.embeddings.get(embedding, EmbeddingTerms()), self._rows[embedding], shapes.embeddings[embedding][0]
        )
        return replace(
            terms,
            linears={**terms.linears, head: of_head},
            embeddings={**terms.embeddings, embedding: of_embedding},
        )


def resize_base(config: LoraConfig | Ia3Config, tensors: AdapterTensors, base: BaseModel) -> ResizedBase | None:
    """The base as the adapter was trained on it; None: with the tokens that it has.

    Raises:
        UnsupportedModelError: rows of new tokens are in no file.
    """
    shapes = base.shapes
    num_rows, width = shapes.embeddings[shapes.input_embedding]
    modules = (shapes.input_embedding, shapes.output_head)
    num_tokens = max(num_rows, *(_num_rows(module, width, tensors) for module in modules))
    replaced: Mapping[str | None, tuple[int, ...]] = config.token_indices if isinstance(config, LoraConfig) else {}
    trained = {token_id for ids in replaced.values() for token_id in ids}
    while num_tokens in trained:
        num_tokens += 1
    if num_tokens == num_rows:
        return None
    if shapes.linears[shapes.output_head].has_bias and not in_saved_module(config.targets, shapes.output_head):
        raise UnsupportedModelError(
            f"{tensors.file} has tokens that its base does not have, and no bias of {shapes.output_head} for them; "
            "name the module in modules_to_save"
        )
    rows = {}
    for module in modules:
        saved = in_saved_module(config.targets, module)
        copy = _copy(module, tensors, saved=saved)
        if copy is not None and len(copy) == num_tokens:
            rows[module] = copy[num_rows:].float()
            continue
        rows[module] = torch.zeros(num_tokens - num_rows, width)  # the adapter's own take their place
        of_module = [set(ids) for name, ids in replaced.items() if _names(name, module, shapes)]
        if not saved and not any(ids.issuperset(range(num_rows, num_tokens)) for ids in of_module):
            raise UnsupportedModelError(
                f"{tensors.file} lacks rows of {module} for tokens from {num_rows} on, which its base does not have; "
                "save the adapter with save_embedding_layers=True, and with the embedding and the head resized"
            )
    return ResizedBase(base, num_tokens - num_rows, rows)


def _num_rows(module: str, width: int, tensors: AdapterTensors) -> int:
    """Of an embedding or a head, as the file has it whole; 0: it has not."""
    names = (f"{module}.{name}" for name in COPIES)
    shapes = (tensors.shape(name) for name in names if name in tensors)
    return max((shape[0] for shape in shapes if shape[1:] == (width,)), default=0)


def _copy(module: str, tensors: AdapterTensors, *, saved: bool) -> Tensor | None:
    names = (f"{module}.{name}" for name in COPIES if not (saved and name == "weight"))
    return next((tensors.peek(name) for name in names if name in tensors), None)


def _names(name: str | None, module: str, shapes: ModelShapes) -> bool:
    """`name` of `trainable_token_indices` means the module, or the embedding that it is tied to."""
    named = shapes.input_embedding if name is None else name
    return module.endswith(named) or shapes.tied.get(module, "").endswith(named)


def _split_linear(terms: LinearTerms, rows: Tensor, has_bias: bool) -> LinearTerms:
    """rows [E, K]: the base's"""
    num_extra = len(rows)
    of_extra = LinearTerms(
        a=terms.a,
        b=None if terms.b is None else terms.b[-num_extra:],
        output_scale=None if terms.output_scale is None else terms.output_scale[-num_extra:],
        input_scale=terms.input_scale,
        dense=None if terms.dense is None else terms.dense[-num_extra:],
    )
    bias = terms.bias
    a, b = terms.a, None if terms.b is None else terms.b[:-num_extra]
    if a is not None and b is not None:  # ranks that only extra rows have
        used = b.any(dim=0)
        a, b = (a[used], b[:, used]) if bool(used.any()) else (None, None)
    return LinearTerms(
        a=a,
        b=b,
        output_scale=None if terms.output_scale is None else terms.output_scale[:-num_extra],
        input_scale=terms.input_scale,
        dense=None if terms.dense is None else terms.dense[:-num_extra],
        bias=None if bias is None else bias[:-num_extra],
        extra_rows=merge_linear(rows, None, of_extra)[0],
        extra_bias=bias[-num_extra:] if has_bias and bias is not None else None,
    )


def _split_embedding(terms: EmbeddingTerms, rows: Tensor, num_rows: int) -> EmbeddingTerms:
    """rows [E, H]: the base's, after its first `num_rows`"""
    token_ids, replaced = terms.token_ids, terms.rows
    extra_ids = extra_replaced = None
    if token_ids is not None and replaced is not None:
        is_extra = token_ids >= num_rows
        extra_ids, extra_replaced = token_ids[is_extra] - num_rows, replaced[is_extra]
        token_ids, replaced = token_ids[~is_extra], replaced[~is_extra]
    of_extra = EmbeddingTerms(extra_ids, extra_replaced, None if terms.a is None else terms.a[:, num_rows:], terms.b)
    has_replaced = token_ids is not None and len(token_ids) > 0
    return EmbeddingTerms(
        token_ids=token_ids if has_replaced else None,
        rows=replaced if has_replaced else None,
        a=None if terms.a is None else terms.a[:, :num_rows].contiguous(),
        b=terms.b,
        extra_rows=merge_embedding(rows, of_extra),
    )
