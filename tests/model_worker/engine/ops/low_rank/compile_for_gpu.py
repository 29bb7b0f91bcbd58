"""Compiles the kernels for a GPU, which need not be there; in a process of its own: elsewhere they are interpreted."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model_worker.engine.ops.low_rank.factors import TABLE_COLUMNS
from model_worker.engine.ops.low_rank.triton_kernels import expand_kernel, shrink_kernel

HOPPER = GPUTarget("cuda", 90, 32)


def compile_kernels() -> None:
    """As they are launched for decoding in bfloat16."""
    blocks = {"TILE_ROWS": 16, "BLOCK_RANKS": 16, "TABLE_COLUMNS": TABLE_COLUMNS, "PRECISION": "tf32"}
    pointers = {"x": "*bf16", "out": "*bf16", "t": "*fp32", "tiles": "*i32", "table": "*i64"}
    _compile(shrink_kernel, pointers, {**blocks, "BLOCK_INPUTS": 64, "SPLIT_INPUTS": 512})
    _compile(expand_kernel, pointers, {**blocks, "BLOCK_OUTPUTS": 128, "NUM_SPLITS": 8})


def _compile(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> None:
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=HOPPER)


if __name__ == "__main__":
    compile_kernels()
