"""A mixture of experts for GPUs: the kernels, run by Triton's interpreter, equal the references."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model_worker.engine.ops.experts.functional import (
    ExpertGroups,
    combine_experts,
    expert_linear,
    group_by_expert,
    select_experts,
)

SHAPES = [(1, 1), (4, 2), (5, 3), (16, 1), (64, 8), (128, 8)]  # experts, and how many are chosen
# Rows, inputs, outputs, experts, chosen: each tile, whole and not, some experts with many rows and some with none.
PRODUCTS = [
    (1, 24, 40, 4, 2),
    (1, 300, 70, 128, 8),
    (9, 64, 96, 5, 3),
    (33, 136, 64, 2, 1),
    (70, 40, 136, 4, 2),
    (150, 72, 136, 2, 2),
    (260, 64, 24, 3, 1),
]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined, and where they are called
        pytest.importorskip("triton")
        yield importlib.import_module("model_worker.engine.ops.experts.triton")


def _choices(num_rows: int, num_experts: int, num_chosen: int) -> Tensor:
    """Popular experts are chosen most."""
    popular = torch.rand(num_rows, num_experts) * torch.linspace(2, 0.1, num_experts)
    return popular.argsort(dim=1, descending=True)[:, :num_chosen].int().contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_experts", "num_chosen"), SHAPES)
def test_choices(kernels: ModuleType, num_experts: int, num_chosen: int, normalize: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(9, num_experts) * 3).to(dtype)
    logits[1] = 0.5  # all equal
    logits[2, num_experts // 2 :] = 2.0  # the largest are equal
    logits[3] = -200.0
    logits[3, -1] = 200.0  # the others' shares are 0
    choices, weights = kernels.select_experts(logits, num_chosen, normalize=normalize)
    expected_choices, expected_weights = select_experts(logits, num_chosen, normalize=normalize)
    assert torch.equal(choices, expected_choices)
    assert choices[1].tolist() == list(range(num_chosen))
    torch.testing.assert_close(weights, expected_weights)
    if normalize:
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(9))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_choices_that_are_no_numbers_are_experts_nevertheless(kernels: ModuleType) -> None:
    """What they compute is of no use, but it is in bounds."""
    logits = torch.full((2, 8), torch.nan)
    for choices, _ in (
        kernels.select_experts(logits, 3, normalize=True),
        select_experts(logits, 3, normalize=True),
    ):
        assert choices.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("num_rows", [1, 2, 37, 700])
@pytest.mark.parametrize(("num_experts", "num_chosen"), SHAPES)
def test_groups(kernels: ModuleType, num_rows: int, num_experts: int, num_chosen: int) -> None:
    torch.manual_seed(num_rows)
    choices = _choices(num_rows, num_experts, num_chosen)
    expected = group_by_expert(choices, num_experts)
    starts, tokens, places = kernels.group_by_expert(choices, num_experts)
    assert torch.equal(starts, expected.starts)
    assert torch.equal(tokens, expected.tokens)
    assert torch.equal(places, expected.places)
    for expert in range(num_experts):
        of_expert = tokens[starts[expert] : starts[expert + 1]]
        assert torch.equal(of_expert, (choices == expert).any(dim=1).nonzero().flatten().int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs", "num_experts", "num_chosen"), PRODUCTS)
def test_products(
    kernels: ModuleType,
    num_rows: int,
    num_inputs: int,
    num_outputs: int,
    num_experts: int,
    num_chosen: int,
    gathers: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(num_rows)
    groups = group_by_expert(_choices(num_rows, num_experts, num_chosen), num_experts)
    wide = torch.randn(num_rows if gathers else num_rows * num_chosen, num_inputs + 8).to(dtype)
    x, weight = wide[:, :num_inputs], (torch.randn(num_experts, num_outputs, num_inputs) * 0.1).to(dtype)
    found = kernels.expert_linear(x, weight, groups.starts, groups.tokens, gathers=gathers)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    expected = expert_linear(x, weight, groups, gathers=gathers)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_every_row_may_choose_the_same_expert(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    for num_rows in (1, 15, 17, 100, 400):
        for chosen in (0, 5):
            groups = group_by_expert(torch.full((num_rows, 1), chosen, dtype=torch.int32), 6)
            x, weight = torch.randn(num_rows, 16), torch.randn(6, 32, 16)
            found = kernels.expert_linear(x, weight, groups.starts, groups.tokens, gathers=True)
            torch.testing.assert_close(found, x @ weight[chosen].T, rtol=1e-4, atol=1e-4)


def test_each_tile_has_a_number_of_rows(kernels: ModuleType) -> None:
    """Those of the warm-up: a kernel that it leaves out would be compiled in a request."""
    for num_experts, num_chosen in SHAPES:
        classes = [
            sum(num_rows * num_chosen > most * num_experts for most in kernels._AVERAGE_PAIRS)
            for num_rows in kernels.rows_of_every_tile(num_experts, num_chosen)
        ]
        assert classes == list(range(len(kernels._TILES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "size", "num_chosen"), [(1, 8, 1), (5, 100, 2), (7, 1500, 8)])
def test_sums(kernels: ModuleType, num_rows: int, size: int, num_chosen: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    groups = group_by_expert(_choices(num_rows, 16, num_chosen), 16)
    y = torch.randn(num_rows * num_chosen, size).to(dtype)
    weights = torch.rand(num_rows, num_chosen)
    found = kernels.combine_experts(y, groups.places, weights)
    expected = combine_experts(y, groups, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_no_rows(kernels: ModuleType) -> None:
    choices, weights = kernels.select_experts(torch.zeros(0, 4), 2, normalize=True)
    groups = ExpertGroups(*kernels.group_by_expert(choices, 4))
    y = kernels.expert_linear(torch.zeros(0, 8), torch.zeros(4, 6, 8), groups.starts, groups.tokens, gathers=True)
    assert y.shape == (0, 6)
    assert kernels.combine_experts(y, groups.places, weights).shape == (0, 6)
