"""(IA)3: learned scales of outputs, or of the inputs of feed-forward modules. Source: arXiv 2205.05638."""

from __future__ import annotations

import re

from delta.peft.adapter_config import Ia3Config
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import BaseModel, LinearShape
from delta.peft.targets import is_target
from delta.peft.terms_builder import TermsBuilder


def read_ia3(config: Ia3Config, tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder) -> None:
    """y = s ∘ (x Wᵀ + b), or y = (s ∘ x) Wᵀ + b for a feed-forward module.

    Raises:
        CheckpointError: a scale is missing, of another shape, or not finite.
    """
    for module, linear in base.shapes.linears.items():
        name = f"{module}.ia3_l"
        if not (name in tensors if config.targets.modules is None else is_target(config.targets, module)):
            continue
        if _scales_inputs(config, module, linear, tensors.shape(name)):
            builder.add_linear(module, input_scale=tensors.take(name, (1, linear.in_features)).reshape(-1))
            continue
        scale = tensors.take(name, (linear.out_features, 1)).reshape(-1)
        builder.add_linear(module, output_scale=scale)
        if linear.has_bias:
            builder.add_linear(module, bias=(scale.float() - 1) * base.bias(module))


def _scales_inputs(config: Ia3Config, module: str, linear: LinearShape, shape: tuple[int, ...]) -> bool:
    if config.feedforward is None:
        return shape == (1, linear.in_features)
    if isinstance(config.feedforward, str):
        return re.fullmatch(config.feedforward, module) is not None
    return module.endswith(config.feedforward)
