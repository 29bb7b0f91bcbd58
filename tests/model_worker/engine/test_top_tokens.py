import pytest
import torch
from hypothesis import given, settings, strategies as st

from model_worker.engine import top_tokens as module
from model_worker.engine.top_tokens import num_settled, top_candidates, top_tokens, top_tokens_by_key

torch.set_num_threads(1)


def ordered(row: torch.Tensor) -> list[int]:
    return sorted(range(len(row)), key=lambda token_id: (-row[token_id].item(), token_id))


def rows_with_ties(seed: int, num_rows: int, vocab_size: int, num_levels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-num_levels, num_levels + 1, (num_rows, vocab_size), generator=generator)
    logits = levels.float() / 4 * torch.where(torch.rand(num_rows, vocab_size, generator=generator) < 0.5, -1.0, 1.0)
    return logits.masked_fill(torch.rand(num_rows, vocab_size, generator=generator) < 0.2, -torch.inf)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 4),
    vocab_size=st.integers(1, 400),
    num_levels=st.sampled_from([0, 1, 5, 1000]),
    num=st.integers(1, 400),
    block=st.sampled_from([2, 7, 64]),
)
def test_candidates_are_the_largest_and_the_settled_ones_are_exact(seed, num_rows, vocab_size, num_levels, num, block):
    num = min(num, vocab_size)
    logits = rows_with_ties(seed, num_rows, vocab_size, num_levels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        values, ids = top_candidates(logits, num)
        exact_values, exact_ids = top_tokens(logits, num)
    assert torch.equal(values, logits.sort(dim=1, descending=True).values[:, :num])
    assert torch.equal(values, logits.gather(1, ids))
    settled = num_settled(values, vocab_size).tolist()
    for row in range(num_rows):
        expected = ordered(logits[row])
        finite = int((logits[row] > -torch.inf).sum())
        sure = min(settled[row], finite)  # the order of tokens that cannot be drawn is of no interest
        assert ids[row, :sure].tolist() == expected[:sure]
        assert settled[row] == num or settled[row] == int((logits[row] > values[row, -1]).sum())
        assert exact_ids[row, : min(num, finite)].tolist() == expected[: min(num, finite)]
        assert torch.equal(exact_values[row], values[row])


def test_a_row_of_equal_logits_goes_to_the_lowest_ids():
    values, ids = top_tokens(torch.zeros(2, 5000), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert values.tolist() == [[0.0] * 3] * 2


def test_negative_zero_ties_with_zero():
    logits = torch.full((1, 1000), -1.0)
    logits[0, 3], logits[0, 9] = -0.0, 0.0
    assert top_candidates(logits, 4)[1][0, :2].tolist() == [3, 9]


def test_all_are_settled_when_there_are_no_others():
    values, _ = top_candidates(torch.zeros(1, 6), 6)
    assert num_settled(values, 6).tolist() == [6]
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 500] = 1.0
    values, ids = top_candidates(logits, 10)
    assert num_settled(values, 1000).tolist() == [10]
    assert ids[0, 0] == 500


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.integers(1, 300),
    num_levels=st.sampled_from([0, 1, 5, 1000]),
    num=st.integers(1, 300),
)
def test_keys_give_the_same_tokens(seed, vocab_size, num_levels, num):
    logits = rows_with_ties(seed, 3, vocab_size, num_levels)
    logits[:, 0] = 0.0
    values, ids = top_tokens_by_key(logits, num)
    exact_values, exact_ids = top_tokens(logits, num)
    assert torch.equal(values, exact_values)
    drawable = values > -torch.inf
    assert torch.equal(ids[drawable], exact_ids[drawable])
