from __future__ import annotations

import pytest
import torch

from delta.codecs.lowrank import LOW_RANK, encode_low_rank, input_root
from delta.codecs.singular_components import singular_components


def test_a_matrix_of_low_rank_comes_back() -> None:
    torch.manual_seed(1)
    difference = torch.randn(60, 5) @ torch.randn(5, 80) * 1e-4
    term = encode_low_rank(difference, 5)
    assert term.parts["a"].shape == (5, 80)
    assert term.parts["b"].shape == (60, 5)
    left = -difference
    LOW_RANK.add_to(left, term.parts)
    assert float(left.norm() / difference.norm()) < 0.01


@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_components_are_nearly_the_largest(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    found = singular_components(matrix, 16, num_power_iterations=2)
    sizes = torch.linalg.svdvals(matrix)
    assert float(found.energies.sum()) > 0.9 * float(sizes[:16].square().sum())
    assert float((matrix - found.b @ found.a).norm() ** 2) == pytest.approx(
        float(matrix.norm() ** 2 - found.energies.sum()), rel=1e-4
    )


def test_the_rank_is_at_most_that_of_the_shape() -> None:
    difference = torch.randn(3, 40)
    term = encode_low_rank(difference, 16)
    assert term.parts["a"].shape == (3, 40)
    left = -difference
    LOW_RANK.add_to(left, term.parts)
    assert float(left.norm() / difference.norm()) < 0.01


def test_the_same_matrix_gives_the_same_term() -> None:
    matrix = torch.randn(50, 60)
    first, second = encode_low_rank(matrix, 8), encode_low_rank(matrix, 8)
    assert torch.equal(first.parts["a"], second.parts["a"])


def test_a_matrix_of_zeros() -> None:
    term = encode_low_rank(torch.zeros(20, 30), 4)
    LOW_RANK.check(term.parts, (20, 30))
    weight = torch.ones(20, 30)
    LOW_RANK.add_to(weight, term.parts)
    assert torch.equal(weight, torch.ones(20, 30))


def test_no_components_and_factors_of_two_types_are_refused() -> None:
    a, b = torch.zeros(2, 30).bfloat16(), torch.zeros(20, 2).bfloat16()
    for parts in ({"a": a[:0], "b": b[:, :0]}, {"a": a, "b": b.half()}, {"a": torch.tensor(1.0), "b": b}):
        with pytest.raises(ValueError):
            LOW_RANK.check(parts, (20, 30))


def _missed(difference: torch.Tensor, inputs: torch.Tensor, root: torch.Tensor | None) -> float:
    left = -difference
    LOW_RANK.add_to(left, encode_low_rank(difference, 4, root).parts)
    return float((inputs @ left.T).norm() / (inputs @ difference.T).norm())


def test_what_is_made_for_inputs_misses_less_for_such_inputs() -> None:
    torch.manual_seed(1)
    difference, mixing = torch.randn(40, 48), torch.randn(48, 48) * torch.logspace(0, -2, 48)[:, None]
    seen, others = torch.randn(200, 48) @ mixing, torch.randn(200, 48) @ mixing
    root = input_root([seen[:150].bfloat16(), seen[150:].bfloat16()])
    assert _missed(difference, others, root) < 0.8 * _missed(difference, others, None)


def test_the_root_is_that_of_the_inputs_second_moment() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(30, 8)
    moment = inputs.T @ inputs / 30
    root = input_root([inputs[:10], inputs[10:]])
    assert torch.equal(root, root.tril())
    expected = moment + 0.01 * moment.diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-4, atol=1e-5)


def test_fewer_inputs_than_columns_and_inputs_of_zeros_have_a_root() -> None:
    difference = torch.randn(6, 20)
    for inputs in (torch.randn(3, 20), torch.zeros(3, 20)):
        term = encode_low_rank(difference, 2, input_root([inputs]))
        assert all(bool(part.isfinite().all()) for part in term.parts.values())
