import numpy as np
import pytest

from model_worker.engine.random_stream import uniform


def test_is_splitmix64():
    # The first outputs of the reference generator for state 0 are those of mix(gamma), mix(2 * gamma), ...;
    # mix(0) = 0, so seed 0 starts there.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    drawn = uniform([0, 0, 0], [0, 1, 2])
    assert drawn.tolist() == [(word >> 11) * 2.0**-53 for word in expected]


def test_is_a_function_of_seed_and_position_alone():
    seeds, positions = [3, -5, 3, 2**64 - 5], [7, 9, 8, 9]
    together = uniform(seeds, positions)
    alone = [uniform([seed], [position])[0] for seed, position in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert together[1] == together[3]  # seeds are taken modulo 2^64
    assert together[0] != together[2]


@pytest.mark.parametrize("stride", [1, 0x9E3779B97F4A7C15, 2**32])
def test_neighbouring_seeds_do_not_give_shifted_streams(stride):
    positions = list(range(500))
    streams = [uniform([5 + stride * index] * 500, positions) for index in range(4)]
    assert len(np.unique(np.concatenate(streams))) == 2000
    correlation = np.corrcoef(streams)
    assert np.abs(correlation - np.eye(4)).max() < 0.2


def test_is_uniform_over_positions_and_over_seeds():
    count = 20_000
    for drawn in (uniform([11] * count, range(count)), uniform(range(count), [11] * count)):
        assert drawn.min() >= 0.0
        assert drawn.max() < 1.0
        observed = np.histogram(drawn, bins=50, range=(0, 1))[0]
        chi_square = ((observed - count / 50) ** 2 / (count / 50)).sum()
        assert chi_square < 86  # 49 degrees of freedom, p = 0.001
