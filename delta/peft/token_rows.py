"""Rows of an embedding or output head that were trained by themselves (`trainable_token_indices`)."""

from __future__ import annotations

import torch
from torch import Tensor

from delta.peft.adapter_config import LoraConfig
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import BaseModel
from delta.peft.terms_builder import TermsBuilder
from delta.variant_terms import EmbeddingTerms
from registry.errors import CheckpointError, UnsupportedModelError


def read_token_rows(config: LoraConfig, tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder) -> None:
    """The file holds the new rows, in the order of the indices. A head tied to the embedding gets the same rows,
    unless it is named with other indices.

    Raises:
        CheckpointError: rows beyond the vocabulary, a module that the base does not have, a tensor missing or wrong.
        UnsupportedModelError: rows of a head with a bias, which PEFT leaves out in training.
    """
    shapes = base.shapes
    by_module: dict[str, tuple[int, ...]] = {}
    for name, token_ids in config.token_indices.items():
        by_module |= dict.fromkeys(_modules(name, tensors, base), token_ids)
    for module, token_ids in by_module.items():
        if by_module.get(shapes.tied.get(module, "")) == token_ids:
            continue
        linear = shapes.linears.get(module)
        num_rows, width = (linear.out_features, linear.in_features) if linear else shapes.embeddings[module]
        if max(token_ids) >= num_rows:
            raise CheckpointError(
                f"{tensors.config_file}: trainable_token_indices goes to {max(token_ids)}, but {module} of this "
                f"base has {num_rows} rows; was the adapter trained on another base?"
            )
        rows = tensors.take(f"{module}.token_adapter.trainable_tokens_delta", (len(token_ids), width))
        ids, order = torch.tensor(token_ids).sort()
        heads = [module]
        if linear is None:
            builder.add_embedding(module, EmbeddingTerms(token_ids=ids, rows=rows[order]))
            tied = [head for head, embedding in shapes.tied.items() if embedding == module]
            heads = [head for head in tied if by_module.get(head, token_ids) == token_ids]
            for head in heads:
                _check_twin(head, rows, tensors)
        for head in heads:
            _replace_rows(head, ids, rows[order], tensors, base, builder)


def _modules(name: str | None, tensors: AdapterTensors, base: BaseModel) -> list[str]:
    shapes = base.shapes
    if name is None:
        return [shapes.input_embedding]
    found = [module for module in (*shapes.embeddings, *shapes.linears) if module.endswith(name)]
    if not found:
        raise CheckpointError(
            f"{tensors.config_file}: trainable_token_indices names {name!r}, which this base does not have; "
            "was the adapter trained on another base?"
        )
    return found


def _check_twin(head: str, rows: Tensor, tensors: AdapterTensors) -> None:
    """PEFT stores the rows of a tied head once more where it saves embeddings."""
    name = f"{head}.token_adapter.trainable_tokens_delta"
    if name in tensors and not torch.equal(tensors.take(name, tuple(rows.shape)), rows):
        raise CheckpointError(
            f"{tensors.file}: {name} differs from the rows of the embedding that {head} is tied to; name it in "
            "trainable_token_indices with other indices, or save the adapter again"
        )


def _replace_rows(
    head: str, ids: Tensor, rows: Tensor, tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder
) -> None:
    """As low-rank terms, one rank for each row, up to as many as the rows are wide; else as a whole matrix."""
    linear = base.shapes.linears[head]
    if linear.has_bias:
        raise UnsupportedModelError(f"{tensors.config_file}: trainable_token_indices on {head}, which has a bias")
    if len(ids) <= linear.in_features:
        chosen = torch.zeros(linear.out_features, len(ids), dtype=rows.dtype)
        chosen[ids, torch.arange(len(ids))] = 1
        builder.add_linear(head, a=rows.float() - base.weight(head)[ids], b=chosen)
        return
    kept = torch.ones(linear.out_features)
    kept[ids] = 0
    dense = torch.zeros(linear.out_features, linear.in_features, dtype=rows.dtype)
    dense[ids] = rows
    builder.add_linear(head, output_scale=kept, dense=dense)
