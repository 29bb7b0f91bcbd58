from __future__ import annotations

import pytest
import torch

from model_worker.engine.layers.linear import DenseMethod, Linear, OneDnnMethod, PackedMethod, choose_method


def _linear(in_features: int, out_features: int, *, bias: bool) -> Linear:
    torch.manual_seed(0)
    layer = Linear(in_features, out_features, bias=bias, dtype=torch.float32, device=torch.device("cpu"))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 32, 200])
@pytest.mark.parametrize("shape", [(24, 40), (33, 7)])
def test_every_method_computes_the_same(shape: tuple[int, int], num_rows: int, bias: bool) -> None:
    layer = _linear(*shape, bias=bias)
    x = torch.randn(1, num_rows, shape[0])
    assert layer.weight is not None
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for make_method in (lambda: DenseMethod(), lambda: OneDnnMethod(), lambda: PackedMethod(layer)):
        layer.method = make_method()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_packed_weight_is_there_only_once() -> None:
    layer = _linear(24, 40, bias=True)
    layer.method = choose_method(layer, shared_weight=False)
    assert isinstance(layer.method, PackedMethod)
    assert layer.weight is None
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_shared_weight_stays_as_it_is() -> None:
    layer = _linear(24, 40, bias=False)
    weight = layer.weight
    layer.method = choose_method(layer, shared_weight=True)
    assert layer.weight is weight
    assert isinstance(layer.method, OneDnnMethod)


def test_half_precision_is_left_to_torch() -> None:
    layer = Linear(4, 4, bias=False, dtype=torch.float16, device=torch.device("cpu"))
    assert isinstance(choose_method(layer, shared_weight=False), DenseMethod)
