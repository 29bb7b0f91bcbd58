"""Tokens that a fine-tune has beyond its base's vocabulary: further rows of the input embedding and the output head."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from delta.peft.base_model import ModelShapes
from delta.variant_terms import EmbeddingTerms, VariantTerms
from registry.errors import UnsupportedModelError


def check_extra_rows(terms: VariantTerms, shapes: ModelShapes, source: Path) -> None:
    """Only the input embedding and the output head have extra rows, with a bias if it has one, and as many each.

    Raises:
        UnsupportedModelError: it is otherwise.
    """
    found = {module: len(each.extra_rows) for module, each in terms.linears.items() if each.extra_rows is not None}
    found |= {module: len(each.extra_rows) for module, each in terms.embeddings.items() if each.extra_rows is not None}
    biases = {module: len(each.extra_bias) for module, each in terms.linears.items() if each.extra_bias is not None}
    found |= {f"{module}.bias": number for module, number in biases.items()}
    if not found:
        return
    expected = dict.fromkeys((shapes.input_embedding, shapes.output_head), max(found.values()))
    if shapes.linears[shapes.output_head].has_bias:
        expected[f"{shapes.output_head}.bias"] = expected[shapes.output_head]
    if found != expected:
        shown = ", ".join(f"{module} {found.get(module, 0)}" for module in sorted(found | expected))
        raise UnsupportedModelError(
            f"{source} has rows that its base has not, but not the same number in the embedding and the head "
            f"({shown}); resize both, and save the fine-tune with both"
        )


def given_rows(terms: EmbeddingTerms, num_rows: int) -> tuple[Tensor | None, Tensor | None]:
    """The tokens whose rows of an embedding [num_rows, H] are given, ascending [n], and these rows [n, H].

    First those in place of the base's, then those beyond them.
    """
    if (extra := terms.extra_rows) is None:
        return terms.token_ids, terms.rows
    ids = torch.arange(num_rows, num_rows + len(extra))
    if terms.token_ids is None or terms.rows is None:
        return ids, extra
    return torch.cat([terms.token_ids, ids]), torch.cat([terms.rows, extra.to(terms.rows.dtype)])
