"""Weights in 8 bits, on the grid of GGUF's Q8_0: a float16 scale for each group of 32 inputs.

    scale = max|w| / 127 in float16,   value = round(w / scale),   w' = scale * value,   |w' - w| <= scale / 2

Source of the grid: ggml's Q8_0. ggml divides by the scale before it is rounded to float16; we divide by the scale that
is kept, which gives the nearest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight, check_finite, check_range, groups_per_chunk, split_groups

_LARGEST = 127


def quantize_int8(weight: Tensor) -> GroupedWeight:
    """Round a weight to 8 bits, on the weight's device.

    What was 8-bit before and reaches 127 in each of its groups, as Q8_0 does, comes back bit for bit.

    Args:
        weight: [N, K] floating point; K is a multiple of 32.

    Raises:
        UnsupportedModelError: another shape, or a scale beyond float16 (a weight beyond 8.3 million).
        CheckpointError: infinite values or NaN.
    """
    groups = split_groups(weight)
    values = torch.empty(groups.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(groups), dtype=torch.float16, device=weight.device)
    at_once = groups_per_chunk(weight.device)
    for start in range(0, len(groups), at_once):
        part = slice(start, start + at_once)
        chunk = groups[part].float()
        peaks = chunk.abs().amax(dim=1)
        check_finite(peaks)
        check_range(float(peaks.max()) / _LARGEST)
        scales[part] = _scales(peaks)
        inverse = torch.where(peaks > 0, 1.0 / scales[part].float(), 0.0)
        values[part] = (chunk * inverse[:, None]).round_().to(torch.int8)
    num_rows = len(weight)
    return GroupedWeight(values.view(num_rows, -1), scales.view(num_rows, weight.shape[1] // GROUP))


def _scales(peaks: Tensor) -> Tensor:
    """peaks / 127 in float16; rounded up where rounding to nearest would leave the peak more than half a step outside.

    That happens among the subnormals only, where neighbouring numbers are far apart.
    """
    nearest = (peaks / _LARGEST).half()
    above = (nearest.view(torch.int16) + 1).view(torch.float16)  # the next number: none here is negative
    return torch.where(peaks > nearest.float() * (_LARGEST + 0.5), above, nearest)
