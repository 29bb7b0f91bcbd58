"""LoRA on the experts of mixtures, which transformers keeps in one parameter [E, N, K] for all experts.

PEFT has them in two forms. For a parameter that is a target itself (`target_parameters`) the ranks of all experts are
side by side:

    A [E·r, in]   rows      e·r … e·r + r      are those of expert e
    B [out, r·E]  columns   e, e + E, e + 2E … are those of expert e

and where several parameters of one module are targets, "base_layer." stands once for each that follows in the module:
the last one's tensors are `experts.lora_A`, those of the one before are `experts.base_layer.lora_A`. Adapters from
before transformers 5 have a pair of matrices for every projection of every expert.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from delta.peft.adapter_config import LoraConfig
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import ExpertsShape, ModelShapes
from delta.peft.targets import ends_with_any, is_target, rank_and_scale
from delta.peft.terms_builder import TermsBuilder, scaled
from delta.variant_terms import LinearTerms
from registry.errors import UnsupportedModelError

_OLD_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Of the projections of Mixtral's experts."""


def read_experts(config: LoraConfig, tensors: AdapterTensors, shapes: ModelShapes, builder: TermsBuilder) -> None:
    """All low-rank terms of experts.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not finite.
        UnsupportedModelError: DoRA or a LoRA bias on experts.
    """
    of_module: dict[str, list[str]] = defaultdict(list)
    for parameter in shapes.experts:
        of_module[parameter.rpartition(".")[0]].append(parameter)
    for module, parameters in of_module.items():
        path = path_in_file(tensors, module)
        if tensors.any_below(f"{path}.0"):
            for parameter in parameters:
                _read_single_experts(config, tensors, path, parameter, shapes.experts[parameter], builder)
            continue
        targets = [parameter for parameter in parameters if ends_with_any(parameter, config.parameters)]
        if targets:
            _refuse_variants(config, tensors, module)
        for depth, parameter in enumerate(reversed(targets)):
            in_file = module + ".base_layer" * depth
            _read_fused(config, tensors, (parameter, in_file), shapes.experts[parameter], builder)


def path_in_file(tensors: AdapterTensors, module: str) -> str:
    """Mixtral's mixtures were called block_sparse_moe before transformers 5."""
    old = module.replace(".mlp.", ".block_sparse_moe.")
    return old if tensors.any_below(old) else module


def _refuse_variants(config: LoraConfig, tensors: AdapterTensors, module: str) -> None:
    if config.use_dora or config.lora_bias:
        raise UnsupportedModelError(
            f"{tensors.config_file}: use_dora and lora_bias are not supported on the experts of {module}; "
            "train the adapter without them"
        )


def _read_fused(
    config: LoraConfig, tensors: AdapterTensors, names: tuple[str, str], shape: ExpertsShape, builder: TermsBuilder
) -> None:
    parameter, in_file = names
    rank, scale = rank_and_scale(config, parameter)
    experts = shape.num_experts
    swapped = shape.transposed and not shape.transposed_in_peft
    in_features, out_features = shape.in_features, shape.out_features
    if swapped:
        in_features, out_features = out_features, in_features
    a = tensors.take(f"{in_file}.lora_A.weight", (experts * rank, in_features)).view(experts, rank, in_features)
    b = tensors.take(f"{in_file}.lora_B.weight", (out_features, rank * experts)).view(out_features, rank, experts)
    for index in range(experts):
        of_a, of_b = a[index], b[:, :, index]
        if swapped:
            of_a, of_b = of_b.T, of_a.T
        terms = LinearTerms(a=of_a.clone(memory_format=torch.contiguous_format), b=scaled(of_b.contiguous(), scale))
        builder.add_expert(parameter, index, terms)


def _read_single_experts(
    config: LoraConfig, tensors: AdapterTensors, path: str, parameter: str, shape: ExpertsShape, builder: TermsBuilder
) -> None:
    """A pair of matrices for each projection; gate and up become the upper and lower rows of one."""
    _refuse_variants(config, tensors, path)
    if shape.gate_and_up:
        projections = ["gate_proj", "up_proj"]
    elif parameter.endswith(".down_proj") and not shape.transposed:
        projections = ["down_proj"]
    else:
        return
    if ".block_sparse_moe." in f"{path}.":
        projections = [_OLD_NAMES[name] for name in projections]
    num_rows = shape.out_features // len(projections)
    for index in range(shape.num_experts):
        pairs: list[tuple[Tensor, Tensor]] = []
        for position, projection in enumerate(projections):
            module = f"{path}.{index}.{projection}"
            if not (tensors.any_below(module) if config.targets.modules is None else is_target(config.targets, module)):
                continue
            rank, scale = rank_and_scale(config, module)
            a = tensors.take(f"{module}.lora_A.weight", (rank, shape.in_features))
            b = scaled(tensors.take(f"{module}.lora_B.weight", (num_rows, rank)), scale)
            whole = b.new_zeros(shape.out_features, rank)
            whole[position * num_rows : (position + 1) * num_rows] = b
            pairs.append((a, whole))
        if pairs:
            of_a, of_b = (torch.cat(parts, dim=dim) for dim, parts in enumerate(zip(*pairs, strict=True)))
            builder.add_expert(parameter, index, LinearTerms(a=of_a, b=of_b))
