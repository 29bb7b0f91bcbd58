"""Adapters with random weights, made and saved by PEFT itself, and tiny models as the bases that they are read for."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from delta.merge_terms import merge_embedding, merge_experts, merge_linear
from delta.peft.base_model import ModelShapes, model_shapes
from delta.variant_terms import VariantTerms


class TinyBase:
    """A model of transformers in memory as a `BaseModel`."""

    def __init__(self, model: nn.Module, digest: str | None = None) -> None:
        self._model = model
        self.shapes: ModelShapes = model_shapes(model)
        self.digest = digest

    def weight(self, module: str) -> Tensor:
        parameter, _, index = module.rpartition(".")
        if (experts := self.shapes.experts.get(parameter)) is not None:
            weight = self._model.get_parameter(parameter)[int(index)].detach().float()
            return weight.T if experts.transposed else weight
        weight = self._model.get_submodule(module).weight.detach().float()
        linear = self.shapes.linears.get(module)
        return weight.T if linear is not None and linear.transposed else weight

    def bias(self, module: str) -> Tensor:
        return self._model.get_submodule(module).bias.detach().float()


def make_adapter(model: PreTrainedModel, config: Any, path: Path, *, seed: int = 0, **save: Any) -> nn.Module:
    """Wrap a copy of the model, give everything that is trained random values, and save it. -> PEFT's model

    The base that PEFT holds is `model`'s, so what its logits differ by is the adapter's.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if not parameter.requires_grad:
                    continue
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name or "ia3" in name or "norm" in name:
                    parameter.mul_(1 + 0.3 * noise)
                elif "lora_embedding" in name or "token_adapter" in name:
                    parameter.copy_(0.1 * noise)
                elif "lora_" in name:
                    parameter.copy_(0.2 * noise)
                else:
                    parameter.add_(0.1 * noise)
        adapted.save_pretrained(path, **save)
    return adapted


def load_with_peft(model: PreTrainedModel, path: Path) -> nn.Module:
    """The adapter as PEFT reads it back from its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


def merged_model(model: PreTrainedModel, terms: VariantTerms) -> PreTrainedModel:
    """A copy of the model with the variant's terms merged into its weights; its head is tied to nothing any more."""
    merged = copy.deepcopy(model)
    shapes = model_shapes(model)
    for head in shapes.tied:
        merged.get_submodule(head).weight = nn.Parameter(merged.get_submodule(head).weight.detach().clone())
    with torch.no_grad():
        for name, linear in terms.linears.items():
            module = merged.get_submodule(name)
            transposed = shapes.linears[name].transposed
            old_bias = getattr(module, "bias", None)
            weight, bias = merge_linear(module.weight.T if transposed else module.weight, old_bias, linear)
            module.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
            if bias is not None:
                module.bias = nn.Parameter(bias)
        for name, experts in terms.experts.items():
            transposed = shapes.experts[name].transposed
            parameter = merged.get_parameter(name)
            weights = merge_experts(parameter.transpose(1, 2) if transposed else parameter, experts)
            parameter.copy_(weights.transpose(1, 2) if transposed else weights)
        for name, embedding in terms.embeddings.items():
            module = merged.get_submodule(name)
            module.weight = nn.Parameter(merge_embedding(module.weight, embedding))
            module.num_embeddings = len(module.weight)
        for name, vector in terms.vectors.items():
            merged.get_parameter(name).copy_(vector)
    merged.config.vocab_size += terms.num_extra_tokens
    return merged
