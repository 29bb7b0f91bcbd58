"""Rotary frequencies that depend on nothing but the config.

Of R rotated elements of a head, with base theta:  f[i] = theta ** (-2 i / R),  i < R / 2, in radians per token, and

    linear      f / factor
    llama3      f / factor where the wavelength 2 pi / f is longer than the original context / low_freq_factor, f where
                it is shorter than that / high_freq_factor, and between a blend, linear in the rotations
    yarn        f where an element turns more than beta_fast times in the original context, f / factor where less than
                beta_slow times, and between a blend, linear in i;  cosines and sines are scaled by 1 + log(factor) / 10
    longrope    f[i] / short_factor[i];  cosines and sines are scaled by sqrt(1 + log(factor) / log(original context))

Source: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (linear); Llama
3.1's model card (llama3); Peng et al., "YaRN" (yarn); Ding et al., "LongRoPE" (longrope). Rounding and defaults are
transformers' (modeling_rope_utils.py), bit for bit: tests/model_worker/engine/models/test_rope_frequencies.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from registry.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary frequencies that some layers share.

    Attributes:
        inverse_frequencies: [R / 2] float32; the first R elements of a head are rotated.
        attention_scaling: of cosines and sines.
    """

    inverse_frequencies: Tensor
    attention_scaling: float


def make_rope(
    rope: Mapping[str, Any], *, head_dim: int, default_is_partial: bool, max_position_embeddings: int
) -> Rope:
    """The frequencies of one kind of layer.

    Args:
        rope: the settings, as `adapters.decoder_config.complete_config` gives them.
        default_is_partial: without scaling too, only `partial_rotary_factor` of a head is rotated.
        max_position_embeddings: the model's, from which factors follow that the settings leave out.

    Raises:
        UnsupportedModelError: frequencies of another kind.
    """
    kind = rope["rope_type"]
    is_partial = default_is_partial or kind != "default"
    num_rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0)) if is_partial else head_dim
    steps = torch.arange(0, num_rotated, 2, dtype=torch.int64).float() / num_rotated
    periods = rope["rope_theta"] ** steps
    if kind == "default":
        return Rope(1.0 / periods, 1.0)
    if kind == "linear":
        return Rope(1.0 / periods / rope["factor"], 1.0)
    if kind == "llama3":
        return Rope(_llama3(1.0 / periods, rope), 1.0)
    if kind == "yarn":
        return _yarn(periods, rope, num_rotated)
    if kind == "longrope":
        return _longrope(periods, rope, max_position_embeddings)
    raise UnsupportedModelError(f"The native decoder does not know the rotary frequencies {kind!r}.")


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > original / low, wavelengths < original / high
    scaled = torch.where(is_long, frequencies / factor, frequencies)
    share = (original / wavelengths - low) / (high - low)
    blended = (1 - share) * scaled / factor + share * scaled
    return torch.where(~is_short & ~is_long, blended, scaled)


def _yarn(periods: Tensor, rope: Mapping[str, Any], num_rotated: int) -> Rope:
    factor, theta = rope["factor"], rope["rope_theta"]
    original = rope["original_max_position_embeddings"]

    def element_of(num_turns: float) -> float:
        """That turns so many times in the original context."""
        return float(num_rotated * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta)))

    low, high = element_of(rope.get("beta_fast") or 32), element_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, num_rotated - 1)
    if low == high:
        high += 0.001
    share = 1 - ((torch.arange(num_rotated // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = 1.0 / (factor * periods) * (1 - share) + 1.0 / periods * share
    scaling = rope.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = _yarn_scaling(factor, mscale) / _yarn_scaling(factor, mscale_all)
        else:
            scaling = _yarn_scaling(factor, 1.0)
    return Rope(frequencies, float(scaling))


def _yarn_scaling(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(periods: Tensor, rope: Mapping[str, Any], max_position_embeddings: int) -> Rope:
    original = rope["original_max_position_embeddings"]
    factor, scaling = rope.get("factor"), rope.get("attention_factor")
    if factor is None:
        factor = max_position_embeddings / original
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(1.0 / (torch.tensor(rope["short_factor"], dtype=torch.float32) * periods), float(scaling))
