"""In torch, the matrix that packed sign planes stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.sign_planes.packed_signs import WORD, PackedSigns


def unpack(signs: PackedSigns, num_inputs: int) -> Tensor:
    """The sum of all planes. -> [N padded, K] float32"""
    num_units, unit = len(signs.starts) - 1, signs.blocks.shape[2]
    of_block = torch.repeat_interleave(torch.arange(num_units), signs.starts.diff())
    row_scales = signs.blocks[:, 0].contiguous().view(torch.float32)  # [blocks, UNIT]
    bits = signs.blocks[:, 1:, None] >> torch.arange(WORD)[:, None] & 1  # [blocks, words, 32, UNIT]
    numbers = (bits.flatten(1, 2) * 2 - 1) * signs.column_scales[signs.scales, :, None] * row_scales[:, None]
    units = torch.zeros(num_units, numbers.shape[1], unit).index_add_(0, of_block, numbers)
    return units.transpose(1, 2).flatten(0, 1)[:, :num_inputs]
