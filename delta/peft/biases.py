"""Biases that were trained along with LoRA (`bias` is "all" or "lora_only"): the file holds the new values."""

from __future__ import annotations

from collections.abc import Collection

from delta.peft.adapter_config import LoraConfig
from delta.peft.adapter_files import AdapterTensors
from delta.peft.base_model import BaseModel
from delta.peft.targets import in_saved_module
from delta.peft.terms_builder import TermsBuilder


def read_biases(
    config: LoraConfig, changed: Collection[str], tensors: AdapterTensors, base: BaseModel, builder: TermsBuilder
) -> None:
    """`changed` are the linear layers with low-rank terms.

    Raises:
        CheckpointError: a bias is missing, of another shape, or not finite.
    """
    if config.bias == "none":
        return
    for module, linear in base.shapes.linears.items():
        if not linear.has_bias or in_saved_module(config.targets, module):
            continue
        if module in changed:
            new = tensors.take(f"{module}.base_layer.bias", (linear.out_features,))
        elif config.bias == "all":
            new = tensors.take(f"{module}.bias", (linear.out_features,))
        else:
            continue
        builder.add_linear(module, bias=new.float() - base.bias(module))
    if config.bias == "all":
        for parameter, shape in base.shapes.vectors.items():
            module, _, name = parameter.rpartition(".")
            if name == "bias" and not in_saved_module(config.targets, module):
                builder.add_vector(parameter, tensors.take(parameter, shape))
