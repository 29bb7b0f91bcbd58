"""Launches the kernel for GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.gated_activation.triton_kernels import gated_activation_kernel
from model_worker.engine.ops.linear import Activation

_BLOCK = 1024
_NUM_WARPS = 4  # 8 numbers a thread: loads of 16 bytes


def gated_activation(x: Tensor, activation: Activation, out: Tensor) -> None:
    """See functional.py."""
    num_rows, width = out.shape
    if num_rows:
        with torch.cuda.device(x.get_device()):
            gated_activation_kernel[(num_rows, -(-width // _BLOCK))](
                x,
                out,
                x.stride(0),
                width,
                IS_SILU=activation is Activation.SILU,
                BLOCK=_BLOCK,
                num_warps=_NUM_WARPS,
            )
