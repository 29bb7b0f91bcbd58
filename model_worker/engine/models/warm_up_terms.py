"""Terms of nobody, bound before the first request: what they launch is compiled then, and not in a request."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from delta.variant_terms import LinearTerms, SignPlane
from model_worker.engine.layers.variants import EXPERT_PARAMETERS, VariantExperts


def warm_up_terms(num_inputs: int, num_outputs: int, num_planes: int) -> LinearTerms:
    """Of the kinds that kernels compute."""
    bits = torch.zeros(num_outputs, -(-num_inputs // 8), dtype=torch.uint8)
    return LinearTerms(
        a=torch.zeros(1, num_inputs),
        b=torch.zeros(num_outputs, 1),
        bias=torch.zeros(num_outputs),
        signs=(SignPlane(bits, torch.zeros(num_outputs)),) * num_planes,
    )


def warm_up_experts(names: Mapping[nn.Module, str]) -> dict[str, dict[int, LinearTerms]]:
    """Of the first expert of one mixture of each shape, by parameter.

    Args:
        names: of transformers' modules.
    """
    shapes: set[tuple[str, torch.Size]] = set()
    found = {}
    for module, path in names.items():
        for name in EXPERT_PARAMETERS if VariantExperts.knows(module) else ():
            weights = module._parameters.get(name)
            if weights is not None and (name, weights.shape) not in shapes:
                shapes.add((name, weights.shape))
                num_outputs, num_inputs = weights.shape[:0:-1] if module.is_transposed else weights.shape[1:]
                found[f"{path}.{name}"] = {0: warm_up_terms(num_inputs, num_outputs, num_planes=1)}
    return found
