"""Compiles kernels for GPUs that need not be there, in a process of its own: elsewhere they are interpreted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

Kernel = tuple[str, str, dict[str, str], dict[str, Any]]
"""Module, name, types of the arguments that are no int32, and the constants. Types as constants: "tl.bfloat16"."""

CAPABILITIES = (90, 80)
_DIVISIBLE = 16  # what launches find of most pointers, strides and sizes
_DIVISIBLE_SIZES = frozenset({"num_inputs", "num_outputs", "size", "width"})


def assert_they_compile(*kernels: Kernel, capabilities: tuple[int, ...] = CAPABILITIES) -> None:
    """Raises AssertionError with the compiler's message where one does not; skips the test without Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    root = Path(__file__).parents[4]
    path = os.pathsep.join([str(root), *sys.path])
    with tempfile.TemporaryDirectory() as cache:
        settings = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path}
        settings.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([kernels, capabilities]),
            env=settings,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def compile_kernel(kernel: Kernel, capability: int) -> Any:
    """The compiled kernel, whose `asm` holds what each step of the compiler made."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, types, given = kernel
    function = getattr(importlib.import_module(module), name)
    options = {key: given[key] for key in ("num_warps", "num_stages", "maxnreg") if key in given}
    constants = {
        key: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for key, value in given.items()
        if key not in options
    }
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in function.arg_names
    }
    attributes = {
        (place,): [["tt.divisibility", _DIVISIBLE]]
        for place, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*") or argument.endswith("stride") or argument in _DIVISIBLE_SIZES
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    wanted, targets = json.load(sys.stdin)
    for each in wanted:
        for target in targets:
            compile_kernel(each, target)
