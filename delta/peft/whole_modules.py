"""Modules that the file holds whole (`modules_to_save`), and copies of the base's embeddings beside an adapter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from delta.peft.adapter_config import TargetRules
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import BaseModel, ExpertsShape, LinearShape
from delta.peft.targets import in_saved_module
from delta.peft.terms_builder import TermsBuilder
from delta.variant_terms import LinearTerms
from registry.errors import CheckpointError

_COPY_TOLERANCE = 2**-7
"""Relative; a base that is served in bfloat16 differs by 2**-8 from a copy in float32."""
_BLOCK_ROWS = 4096
_COPIES: tuple[str, ...] = ("base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight")
"""Names below a module under which PEFT stores the base's weight, where it saves embeddings."""


def read_whole_modules(
    rules: TargetRules, tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder, *, tied: bool
) -> None:
    """Replace the modules that `rules` says are saved; with `tied`, an output head along with its embedding.

    Raises:
        CheckpointError: a saved module is missing, of another shape, or not in the base; the base is another one.
    """
    shapes = base.shapes
    _check_names(rules, tensors, base)
    for module, linear in shapes.linears.items():
        source = shapes.tied.get(module, module) if tied else module
        if in_saved_module(rules, module) or in_saved_module(rules, source):
            _read_linear(module, linear, tensors, base, builder)
            names = _COPIES
        else:
            names = (*_COPIES, "weight")
        _check_copies(names, module, (linear.out_features, linear.in_features), linear.transposed, tensors, base)
    for module, shape in shapes.embeddings.items():
        if in_saved_module(rules, module):
            builder.add_table(module, _take_saved(module, shape, tensors))
            names = _COPIES
        else:
            names = (*_COPIES, "weight")
        _check_copies(names, module, shape, False, tensors, base)
    for parameter, vector_shape in shapes.vectors.items():
        if in_saved_module(rules, parameter.rpartition(".")[0]):
            builder.add_vector(parameter, tensors.take(parameter, vector_shape))
    for parameter, experts in shapes.experts.items():
        if in_saved_module(rules, parameter.rpartition(".")[0]):
            _read_experts(parameter, experts, tensors, builder)


def _check_names(rules: TargetRules, tensors: AdapterTensors, base: BaseModel) -> None:
    shapes = base.shapes
    owners = {parameter.rpartition(".")[0] for parameter in (*shapes.vectors, *shapes.experts)}
    paths = {*shapes.linears, *shapes.embeddings, *owners}
    for name in rules.saved_modules:
        only = TargetRules((), (), None, (), (name,))
        if not any(in_saved_module(only, path) for path in paths):
            raise CheckpointError(
                f"{tensors.config_file}: modules_to_save names {name!r}, which this base does not have; "
                "was the adapter trained on another base?"
            )


def _read_linear(
    module: str, linear: LinearShape, tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder
) -> None:
    shape = (linear.out_features, linear.in_features)
    stored = _take_saved(module, shape[::-1] if linear.transposed else shape, tensors)
    weight = stored.T.contiguous() if linear.transposed else stored
    builder.add_linear(module, output_scale=torch.zeros(linear.out_features), dense=weight)
    if linear.has_bias:
        bias = tensors.take(f"{module}.bias", (linear.out_features,))
        builder.add_linear(module, bias=bias.float() - base.bias(module))


def _read_experts(parameter: str, shape: ExpertsShape, tensors: AdapterTensors, builder: TermsBuilder) -> None:
    rows, columns = shape.out_features, shape.in_features
    stored = (columns, rows) if shape.transposed else (rows, columns)
    weights = tensors.take(parameter, (shape.num_experts, *stored))
    for index, weight in enumerate(weights):
        dense = (weight.T if shape.transposed else weight).clone(memory_format=torch.contiguous_format)
        builder.add_expert(parameter, index, LinearTerms(output_scale=torch.zeros(rows), dense=dense))


def _take_saved(module: str, shape: tuple[int, int], tensors: AdapterTensors) -> Tensor:
    """The new weight of a module, which PEFT stores twice where it saves embeddings."""
    hint = "; an adapter with a smaller vocabulary needs a base of that size"
    weight = tensors.take(f"{module}.weight", shape, hint)
    twin = f"{module}.modules_to_save.weight"
    if twin in tensors and not torch.equal(tensors.take(twin, shape, hint), weight):
        raise CheckpointError(f"{tensors.file}: {module}.weight and {twin} differ; save the adapter again")
    return weight


def _check_copies(
    names: Iterable[str],
    module: str,
    shape: tuple[int, int],
    transposed: bool,
    tensors: AdapterTensors,
    base: BaseModel,
) -> None:
    """PEFT stores the base's embeddings beside low-rank terms for them; they must be those of this base."""
    for name in (f"{module}.{each}" for each in names):
        if name not in tensors:
            continue
        hint = "; an adapter with a smaller vocabulary needs a base of that size"
        copy = tensors.take(name, shape[::-1] if transposed else shape, hint)
        if not _is_copy(copy.T if transposed else copy, base.weight(module)):
            raise CheckpointError(
                f"{tensors.file}: {name} is not the weight of this base, and modules_to_save does not name it. Serve "
                "the adapter with its own base; if the module was trained, name it in modules_to_save"
            )


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    """Block by block, since both may be large."""
    blocks = zip(torch.split(copy, _BLOCK_ROWS), torch.split(weight, _BLOCK_ROWS), strict=True)
    return all(torch.allclose(ours.float(), theirs, rtol=_COPY_TOLERANCE, atol=1e-6) for ours, theirs in blocks)
