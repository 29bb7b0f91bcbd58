"""Compiles the kernel for a GPU, which need not be there; in a process of its own: elsewhere it is interpreted."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model_worker.engine.ops.sign_matmul.sign_matrix import TABLE_COLUMNS
from model_worker.engine.ops.sign_matmul.triton_kernels import add_signs_kernel

HOPPER = GPUTarget("cuda", 90, 32)


def compile_kernel(tile_rows: int, block_outputs: int) -> None:
    """As it is launched in bfloat16."""
    constants: dict[str, Any] = {
        "NUM_PLANES": 2,
        "TILE_ROWS": tile_rows,
        "BLOCKS": 4,
        "BLOCK_BITS": 4,
        "BLOCK_OUTPUTS": block_outputs,
        "TABLE_COLUMNS": TABLE_COLUMNS,
        "PRODUCT_DTYPE": tl.bfloat16,
        "PRECISION": "tf32",
    }
    pointers = {"x": "*bf16", "out": "*bf16", "tiles": "*i32", "table": "*i64"}
    names = add_signs_kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    triton.compile(ASTSource(fn=add_signs_kernel, signature=signature, constexprs=constants), target=HOPPER)


if __name__ == "__main__":
    compile_kernel(16, 32)
    compile_kernel(64, 128)
