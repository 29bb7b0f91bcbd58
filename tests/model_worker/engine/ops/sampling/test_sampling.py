"""The kernels for GPUs, run by Triton's interpreter, draw the tokens that the definition says."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from model_worker.engine.ops.sampling.reference import draw_reference
from tests.model_worker.engine.ops.compile_for_gpu import assert_they_compile

# numpy's, in the interpreter, of the distance between two infinities: a token without weight
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def kernels(interpreted: Callable[[str], ModuleType]) -> ModuleType:
    return interpreted("sampling")


def _parameters(rows: list[tuple[float, float, int, float]], vocab_size: int) -> torch.Tensor:
    """top_k 0: off"""
    chosen = [(scale, min_p, min(top_k or vocab_size, vocab_size), top_p) for scale, min_p, top_k, top_p in rows]
    uniform = torch.rand(len(rows), 1, dtype=torch.float64)
    return torch.cat((torch.tensor(chosen, dtype=torch.float64), uniform), dim=1)


_KINDS = {
    "greedy": (1.0, 0.0, 1, 1.0),
    "all": (1.0, 0.0, 0, 1.0),
    "hot": (0.2, 0.0, 0, 1.0),
    "cold": (1e5, 0.0, 0, 1.0),
    "min_p": (1.0, 0.2, 0, 1.0),
    "top_k": (1.0, 0.0, 7, 1.0),
    "top_p": (1.0, 0.0, 0, 0.7),
    "hot top_p": (0.1, 0.0, 0, 0.95),
    "tiny top_p": (1.0, 0.0, 0, 1e-9),
    "everything": (0.7, 0.01, 12, 0.8),
    "min_p of 1": (1.0, 1.0, 0, 0.9),
}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(("vocab_size", "block"), [(3, 16), (64, 64), (300, 128)])
def test_every_kind_of_row(kernels: ModuleType, vocab_size: int, block: int, coarse: bool) -> None:
    torch.manual_seed(vocab_size)
    for scale, num_ordered in ((0.0, 16), (1.0, 16), (6.0, 64)):
        logits = torch.randn(len(_KINDS), vocab_size) * scale
        if coarse:
            logits = (logits * 2).round() / 2 * torch.where(torch.rand(logits.shape) < 0.5, 1.0, -1.0)
            logits.masked_fill_(torch.rand(logits.shape) < 0.2, -torch.inf)
            logits[:, 1] = 0.0
        parameters = _parameters(list(_KINDS.values()), vocab_size)
        tokens, finite = kernels.draw_tokens(logits, parameters, num_ordered, block)
        expected, expected_finite = draw_reference(logits, parameters, num_ordered)
        assert torch.equal(finite, expected_finite)
        assert dict(zip(_KINDS, tokens.tolist(), strict=True)) == dict(zip(_KINDS, expected.tolist(), strict=True))


def test_frequencies_follow_the_uniform_number(kernels: ModuleType) -> None:
    """The ends of [0, 1) draw the first and the last token that is kept."""
    logits = torch.tensor([2.0, 0.0, 1.0, 1.0, -torch.inf, 3.0]).repeat(4, 1)
    rows = [(1.0, 0.0, 0.0), (1.0, 0.0, 1 - 2**-53), (0.9, 0.0, 0.0), (0.9, 0.0, 1 - 2**-53)]
    parameters = torch.tensor([(1.0, min_p, 6, top_p, uniform) for top_p, min_p, uniform in rows], dtype=torch.float64)
    tokens, _ = kernels.draw_tokens(logits, parameters, 16, 16)
    assert tokens.tolist() == [0, 5, 5, 3]


def test_rows_that_are_not_finite(kernels: ModuleType) -> None:
    logits = torch.zeros(8, 100)
    logits[0, 50] = float("nan")
    logits[1] = float("nan")
    logits[2, 99] = float("inf")
    logits[3] = -float("inf")
    parameters = _parameters([_KINDS["greedy"], _KINDS["top_p"], _KINDS["all"], _KINDS["top_k"]] * 2, 100)
    tokens, finite = kernels.draw_tokens(logits, parameters, 16, 64)
    assert finite.tolist() == [False] * 4 + [True] * 4
    assert tokens[:4].tolist() == [0] * 4
    assert torch.equal(tokens, draw_reference(logits, parameters, 16)[0])


def test_greedy_takes_the_lowest_id_of_equal_logits_also_of_zeros(kernels: ModuleType) -> None:
    logits = torch.full((2, 300), -1.0)
    logits[0, [200, 40, 90]] = 5.0
    logits[1, 30], logits[1, 70] = -0.0, 0.0
    tokens, _ = kernels.draw_tokens(logits, _parameters([_KINDS["greedy"]] * 2, 300), 16, 64)
    assert tokens.tolist() == [40, 30]


def test_a_row_does_not_depend_on_its_neighbours(kernels: ModuleType) -> None:
    torch.manual_seed(3)
    logits, parameters = torch.randn(len(_KINDS), 200) * 3, _parameters(list(_KINDS.values()), 200)
    together, _ = kernels.draw_tokens(logits, parameters, 16, 64)
    for row in range(len(_KINDS)):
        alone, _ = kernels.draw_tokens(logits[row : row + 1], parameters[row : row + 1], 16, 64)
        assert alone.item() == together[row].item()


def test_they_compile_for_gpus() -> None:
    types = {
        "logits": "*fp32",
        "parameters": "*fp64",
        "tokens": "*i64",
        "finite": "*i1",
        "peaks": "*fp32",
        "totals": "*i64",
        "settled": "*i32",
        "candidates": "*i64",
    }
    constants = {"NUM_ORDERED": 1024, "PARAMETERS": 5, "BLOCK": 4096, "num_warps": 16}
    module = "model_worker.engine.ops.sampling.triton_kernels"
    assert_they_compile(
        (module, "collect_kernel", types, constants), (module, "draw_kernel", types, {**constants, "PIECE": 16})
    )
