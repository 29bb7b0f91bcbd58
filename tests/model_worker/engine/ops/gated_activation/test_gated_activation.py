"""Gated activations round where transformers does; the kernel for GPUs, run by the interpreter, equals that."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from transformers.activations import ACT2FN

from model_worker.engine.ops.gated_activation.functional import gated_activation
from model_worker.engine.ops.linear import Activation
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

# numpy's, in the interpreter; the quotient is 0 then, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_NAMES = {Activation.SILU: "silu", Activation.GELU_TANH: "gelu_pytorch_tanh"}
_RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # the interpreter cuts bfloat16 off


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("gated_activation")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", _NAMES)
def test_the_reference_is_transformers(activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 60) * 4).to(dtype)
    expected = ACT2FN[_NAMES[activation]](x[:, :30]) * x[:, 30:]
    assert torch.equal(gated_activation(x, activation), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", _NAMES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 1), (3, 100), (2, 1024), (4, 1536)])
def test_the_kernel(kernels: ModuleType, num_rows: int, width: int, activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    wide = (torch.randn(num_rows, 2 * width + 3) * 8).to(dtype)
    x = wide[:, : 2 * width]
    out = torch.full((num_rows, width), 7.0, dtype=dtype)
    kernels.gated_activation(x, activation, out)
    torch.testing.assert_close(out, gated_activation(x, activation), rtol=_RTOL[dtype], atol=_RTOL[dtype])


def test_gates_far_from_zero_do_not_overflow(kernels: ModuleType) -> None:
    x = torch.tensor([[-300.0, 300.0, -30000.0, 1.0, 1.0, 1.0]])
    for activation in _NAMES:
        out = torch.empty(1, 3)
        kernels.gated_activation(x, activation, out)
        torch.testing.assert_close(out, torch.tensor([[0.0, 300.0, 0.0]]))


def test_it_compiles_for_gpus() -> None:
    module, types = "model_worker.engine.ops.gated_activation.triton_kernels", {"x": "*bf16", "out": "*bf16"}
    assert_they_compile(
        *((module, "gated_activation_kernel", types, {"IS_SILU": silu, "BLOCK": 1024}) for silu in (True, False))
    )
