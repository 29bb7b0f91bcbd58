"""Rotary embeddings that a server cannot use, because they look at the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.errors import UnsupportedModelError


def refuse_batch_dependent_rope(rope: Mapping[str, Any], max_model_len: int) -> None:
    """Rotary frequencies that depend on the longest sequence of the batch would let requests change each other.

    Args:
        rope: `rope_type` and its settings, of the model or of one kind of layer.
        max_model_len: most positions that will ever be used.

    Raises:
        UnsupportedModelError: these are such.
    """
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
