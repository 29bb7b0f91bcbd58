"""LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353) on linear layers and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from delta.peft.adapter_config import LoraConfig
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import BaseModel, LinearShape
from delta.peft.biases import read_biases
from delta.peft.experts import path_in_file, read_experts
from delta.peft.targets import ends_with_any, is_target, rank_and_scale
from delta.peft.terms_builder import TermsBuilder, scaled
from delta.peft.token_rows import read_token_rows
from delta.variant_terms import EmbeddingTerms
from registry.errors import CheckpointError, UnsupportedModelError


def read_lora(config: LoraConfig, tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder) -> None:
    """All terms of a LoRA adapter but for the modules that it holds whole.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not finite; a parameter that the base does not have.
        UnsupportedModelError: a combination that PEFT does not define.
    """
    shapes = base.shapes
    _check_parameters_exist(config, tensors, base)
    changed = []
    for module, linear in shapes.linears.items():
        path = path_in_file(tensors, module)
        as_parameter = ends_with_any(f"{module}.weight", config.parameters)
        if not as_parameter and not _is_lora_target(config, tensors, base, path):
            continue
        changed.append(module)
        if as_parameter:
            _read_linear_parameter(config, tensors, module, linear, builder)
        else:
            _read_linear(config, tensors, base, (module, path), builder)
    for module, (num_rows, width) in shapes.embeddings.items():
        if _is_lora_target(config, tensors, base, module):
            _read_embedding(config, tensors, base, (module, num_rows, width), builder)
    read_experts(config, tensors, shapes, builder)
    read_biases(config, changed, tensors, base, builder)
    read_token_rows(config, tensors, base, builder)


def _check_parameters_exist(config: LoraConfig, tensors: AdapterTensors, base: BaseModel) -> None:
    known = [*base.shapes.experts, *(f"{module}.weight" for module in base.shapes.linears)]
    for name in config.parameters:
        if not any(ends_with_any(parameter, (name,)) for parameter in known):
            raise CheckpointError(
                f"{tensors.config_file}: target_parameters names {name!r}, which this base does not have as a weight; "
                "was the adapter trained on another base?"
            )


def _is_lora_target(config: LoraConfig, tensors: AdapterTensors, base: BaseModel, module: str) -> bool:
    if config.tied and module in base.shapes.tied:
        return _is_lora_target(config, tensors, base, base.shapes.tied[module])
    if config.targets.modules is not None:
        return is_target(config.targets, module)
    return any(tensors.any_below(f"{module}.{part}") for part in ("lora_A", "lora_B")) or any(
        f"{module}.{part}" in tensors for part in ("lora_embedding_A", "lora_embedding_B")
    )


def _read_linear(
    config: LoraConfig, tensors: AdapterTensors, base: BaseModel, names: tuple[str, str], builder: TermsBuilder
) -> None:
    """W + s B A, or with DoRA m ∘ (W + s B A) / ‖W + s B A‖, the norm of each row."""
    module, path = names
    linear = base.shapes.linears[module]
    rank, scale = rank_and_scale(config, path)
    a = tensors.take(f"{path}.lora_A.weight", (rank, linear.in_features))
    b = tensors.take(f"{path}.lora_B.weight", (linear.out_features, rank))
    if config.use_dora:
        output_scale = _magnitude(tensors, path, linear.out_features) / _row_norms(base.weight(module), a, b, scale)
        builder.add_linear(module, a=a, b=b.float() * scale * output_scale[:, None], output_scale=output_scale)
        return
    builder.add_linear(module, a=a, b=scaled(b, scale))
    if config.lora_bias:
        builder.add_linear(module, bias=scaled(tensors.take(f"{path}.lora_B.bias", (linear.out_features,)), scale))


def _read_linear_parameter(
    config: LoraConfig, tensors: AdapterTensors, module: str, linear: LinearShape, builder: TermsBuilder
) -> None:
    """A weight that is a target itself: B A is added to it as it is stored."""
    _refuse_for_parameters(config, tensors, module)
    rank, scale = rank_and_scale(config, f"{module}.weight")
    stored = (linear.out_features, linear.in_features)
    rows, columns = reversed(stored) if linear.transposed else stored
    a = tensors.take(f"{module}.lora_A.weight", (rank, columns))
    b = tensors.take(f"{module}.lora_B.weight", (rows, rank))
    if linear.transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    builder.add_linear(module, a=a, b=scaled(b, scale))


def _refuse_for_parameters(config: LoraConfig, tensors: AdapterTensors, module: str) -> None:
    if config.use_dora or config.lora_bias:
        raise UnsupportedModelError(
            f"{tensors.config_file}: use_dora and lora_bias are not defined for the parameters of {module}"
        )


def _read_embedding(
    config: LoraConfig, tensors: AdapterTensors, base: BaseModel, at: tuple[str, int, int], builder: TermsBuilder
) -> None:
    """Row i is W[i] + s B A[:, i]; with DoRA all rows are given, since each column is scaled."""
    module, num_rows, width = at
    rank, scale = rank_and_scale(config, module)
    hint = "; an adapter with a vocabulary of another size needs a base of that size"
    a = tensors.take(f"{module}.lora_embedding_A", (rank, num_rows), hint)
    b = tensors.take(f"{module}.lora_embedding_B", (width, rank))
    if not config.use_dora:
        builder.add_embedding(module, EmbeddingTerms(a=a, b=scaled(b, scale)))
        return
    table = base.weight(module) + (a.T.float() @ b.T.float()) * scale  # [V, H]
    column_scale = _magnitude(tensors, module, width) / torch.linalg.vector_norm(table, dim=0)
    builder.add_table(module, (table * column_scale).to(a.dtype))


def _magnitude(tensors: AdapterTensors, path: str, length: int) -> Tensor:
    """m of DoRA; older and newer files name it differently. -> [length] float32"""
    name = f"{path}.lora_magnitude_vector"
    return tensors.take(f"{name}.weight" if f"{name}.weight" in tensors else name, (length,)).float()


def _row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row. weight [N, K] -> [N] float32"""
    norms: Tensor = torch.linalg.vector_norm(weight.float() + (b.float() @ a.float()) * scale, dim=1)
    return norms
