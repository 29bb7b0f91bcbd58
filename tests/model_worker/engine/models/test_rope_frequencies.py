"""Frequencies and scalings equal those of transformers bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model_worker.engine.models.rope_frequencies import make_rope
from registry.errors import UnsupportedModelError

_POSITIONS = 32768
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 7 for i in range(32)],
    "long_factor": [2.0 + i for i in range(32)],
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0, "partial_rotary_factor": 0.25},
        {**_LLAMA3, "original_max_position_embeddings": 8192},
        {**_LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0, "partial_rotary_factor": 0.5},
        _YARN,
        {**_YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**_YARN, "factor": 1.0},
        {**_YARN, "attention_factor": 1.25},
        {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        {**_YARN, "partial_rotary_factor": 0.5},
        _LONGROPE,
        {**_LONGROPE, "factor": 2.0},
        {**_LONGROPE, "attention_factor": 1.5},
        {**_LONGROPE, "original_max_position_embeddings": _POSITIONS},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_they_equal_those_of_transformers(rope: dict[str, Any]) -> None:
    config = LlamaConfig(head_dim=64, max_position_embeddings=_POSITIONS, rope_parameters=dict(rope))
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    made = make_rope(rope, head_dim=64, default_is_partial=False, max_position_embeddings=_POSITIONS)
    assert torch.equal(made.inverse_frequencies, frequencies)
    assert made.attention_scaling == scaling


@pytest.mark.parametrize(("default_is_partial", "num_rotated"), [(False, 64), (True, 48)])
def test_without_scaling_some_families_rotate_a_part_only(default_is_partial: bool, num_rotated: int) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    made = make_rope(rope, head_dim=64, default_is_partial=default_is_partial, max_position_embeddings=_POSITIONS)
    steps = torch.arange(0, num_rotated, 2, dtype=torch.float)
    assert torch.equal(made.inverse_frequencies, 1.0 / (1e4 ** (steps / num_rotated)))


def test_other_kinds_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'spiral'"):
        make_rope({"rope_type": "spiral", "rope_theta": 1e4}, head_dim=64, default_is_partial=False,
                  max_position_embeddings=_POSITIONS)  # fmt: skip
