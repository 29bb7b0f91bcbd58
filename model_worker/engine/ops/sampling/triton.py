"""Launches the kernels for GPUs: two for all rows, whatever their parameters are."""

from __future__ import annotations

import torch
from torch import Tensor

from model_worker.engine.ops.sampling.reference import PARAMETER_COLUMNS
from model_worker.engine.ops.sampling.triton_kernels import collect_kernel, draw_kernel

_BLOCK = 4096  # tokens that a program looks at at once; more do not fit its registers
_PIECE = 16  # candidates that each candidate is compared with at once
_NUM_WARPS = 16


def draw_tokens(logits: Tensor, parameters: Tensor, num_ordered: int, block: int = _BLOCK) -> tuple[Tensor, Tensor]:
    """See functional.py. Rows with num_ordered < top_k < V get any token.

    Args:
        num_ordered: a power of two.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    peaks = torch.empty(num_rows, dtype=torch.float32, device=device)
    totals = torch.empty(num_rows, dtype=torch.int64, device=device)
    settled = torch.empty(num_rows, dtype=torch.int32, device=device)
    candidates = torch.empty(num_rows, 2, num_ordered, dtype=torch.int64, device=device)
    if num_rows:
        with torch.cuda.device(logits.get_device()):
            collect_kernel[(num_rows,)](
                logits,
                parameters,
                tokens,
                finite,
                peaks,
                totals,
                settled,
                candidates,
                vocab_size,
                NUM_ORDERED=num_ordered,
                PARAMETERS=PARAMETER_COLUMNS,
                BLOCK=block,
                num_warps=_NUM_WARPS,
            )
            draw_kernel[(num_rows,)](
                logits,
                parameters,
                tokens,
                finite,
                peaks,
                totals,
                settled,
                candidates,
                vocab_size,
                NUM_ORDERED=num_ordered,
                PARAMETERS=PARAMETER_COLUMNS,
                BLOCK=block,
                PIECE=_PIECE,
                num_warps=_NUM_WARPS,
            )
    return tokens, finite
