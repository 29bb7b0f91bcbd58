"""Launches the kernels for GPUs: one for each of the four functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from model_worker.engine.ops.experts.triton_kernels import (
    combine_kernel,
    expert_linear_kernel,
    group_kernel,
    select_kernel,
)

_BLOCK_PAIRS = 1024
_COMBINED_BLOCK = 1024
_NUM_WARPS = 4
_PRODUCT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class _Tile:
    """What a program of the product computes.

    Attributes:
        depth_bytes: of the inputs that it looks at at once.
        group: tiles of rows that are computed together.
    """

    rows: int
    outputs: int
    depth_bytes: int
    num_warps: int
    num_stages: int
    group: int


_AVERAGE_PAIRS = (16, 64)
"""Of an expert: up to so many, and beyond, there is a tile each. All fit the 99 KiB of small devices."""

_TILES = (
    _Tile(16, 64, 256, num_warps=4, num_stages=4, group=1),
    _Tile(64, 64, 128, num_warps=4, num_stages=4, group=8),
    _Tile(128, 128, 128, num_warps=8, num_stages=3, group=16),
)


def rows_of_every_tile(num_experts: int, num_chosen: int) -> tuple[int, ...]:
    """Numbers of rows of steps that between them have all tiles."""
    return (1, *(most * num_experts // num_chosen + 1 for most in _AVERAGE_PAIRS))


def select_experts(logits: Tensor, num_chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """See functional.py."""
    num_rows, num_experts = logits.shape
    choices = torch.empty(num_rows, num_chosen, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_rows, num_chosen, dtype=torch.float32, device=logits.device)
    if num_rows:
        with torch.cuda.device(logits.get_device()):
            select_kernel[(num_rows,)](
                logits,
                choices,
                weights,
                num_experts,
                NUM_CHOSEN=num_chosen,
                NORMALIZES=normalize,
                BLOCK_EXPERTS=_power_of_two(num_experts),
                BLOCK_CHOSEN=_power_of_two(num_chosen),
                num_warps=1,
            )
    return choices, weights


def group_by_expert(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> starts, tokens, places of `ExpertGroups`"""
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=choices.device)
    tokens = torch.empty(choices.numel(), dtype=torch.int32, device=choices.device)
    places = torch.empty_like(choices)
    with torch.cuda.device(choices.get_device()):
        group_kernel[(num_experts,)](
            choices,
            starts,
            tokens,
            places,
            choices.numel(),
            num_experts,
            NUM_CHOSEN=choices.shape[1],
            BLOCK_PAIRS=_BLOCK_PAIRS,
            num_warps=_NUM_WARPS,
        )
    return starts, tokens, places


def expert_linear(x: Tensor, weight: Tensor, starts: Tensor, tokens: Tensor, *, gathers: bool) -> Tensor:
    """See functional.py."""
    num_experts, num_outputs, num_inputs = weight.shape
    num_pairs = len(tokens)
    out = torch.empty(num_pairs, num_outputs, dtype=x.dtype, device=x.device)
    tile = _TILES[sum(num_pairs > most * num_experts for most in _AVERAGE_PAIRS)]
    num_tiles = min(num_pairs, num_experts + num_pairs // tile.rows)  # whichever experts they have chosen
    if num_tiles:
        with torch.cuda.device(x.get_device()):
            expert_linear_kernel[(num_tiles * -(-num_outputs // tile.outputs),)](
                x,
                weight,
                starts,
                tokens,
                out,
                num_tiles,
                num_experts,
                num_outputs,
                num_inputs,
                x.stride(0),
                GATHERS=gathers,
                BLOCK_EXPERTS=_power_of_two(num_experts),
                BLOCK_ROWS=tile.rows,
                BLOCK_OUTPUTS=tile.outputs,
                BLOCK_INPUTS=tile.depth_bytes // x.element_size(),
                GROUP_TILES=tile.group,
                PRODUCT_DTYPE=_PRODUCT_DTYPES[x.dtype] if x.is_cuda else tl.float32,  # the interpreter has no bfloat16
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    return out


def combine_experts(y: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """See functional.py."""
    num_rows, num_chosen = places.shape
    size = y.shape[1]
    out = torch.empty(num_rows, size, dtype=y.dtype, device=y.device)
    if num_rows:
        with torch.cuda.device(y.get_device()):
            combine_kernel[(num_rows, -(-size // _COMBINED_BLOCK))](
                y,
                places,
                weights,
                out,
                size,
                NUM_CHOSEN=num_chosen,
                BLOCK=_COMBINED_BLOCK,
                num_warps=_NUM_WARPS,
            )
    return out


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
