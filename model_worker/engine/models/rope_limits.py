"""Rotary embeddings that a server cannot use, because they look at the whole batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from registry.errors import UnsupportedModelError


def refuse_batch_dependent_rope(model: nn.Module, max_model_len: int) -> None:
    """Rotary frequencies that depend on the longest sequence of the batch would let requests change each other."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    for module in modules:
        parameters = module.config.rope_parameters  # of the model, or of each layer type
        for rope in parameters.values() if isinstance(module.rope_type, dict) else [parameters]:
            if rope["rope_type"] == "dynamic":
                raise UnsupportedModelError(
                    "Rope scaling 'dynamic' makes answers depend on other requests in the batch; use a release of the "
                    "model with 'yarn' or 'linear' scaling."
                )
            if rope["rope_type"] == "longrope" and max_model_len > rope["original_max_position_embeddings"]:
                raise UnsupportedModelError(
                    "Rope scaling 'longrope' makes answers depend on other requests once one of them is long; use "
                    f"--max-model-len {rope['original_max_position_embeddings']}."
                )
