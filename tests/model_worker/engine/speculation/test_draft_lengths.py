from itertools import product

from hypothesis import given, settings, strategies as st

from model_worker.engine.speculation.draft_lengths import draft_lengths


def speed(lengths, rates, num_rows, step_s, row_s):
    gained = sum(sum(rate**j for j in range(1, num + 1)) for rate, num in zip(rates, lengths, strict=True))
    return (num_rows + gained) / (step_s + row_s * sum(lengths))


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.floats(0.0, 0.99), st.integers(0, 3)), min_size=1, max_size=4),
    max_drafts=st.integers(0, 8),
    fixed_s=st.floats(0.0, 10.0),
    row_s=st.floats(0.01, 1.0),
)
def test_no_other_lengths_would_be_faster(sequences, max_drafts, fixed_s, row_s):
    rates, most = [rate for rate, _ in sequences], [num for _, num in sequences]
    step_s = fixed_s + row_s * len(rates)
    lengths = draft_lengths(rates, most, num_rows=len(rates), max_drafts=max_drafts, step_s=step_s, row_s=row_s)
    assert all(0 <= length <= num for length, num in zip(lengths, most, strict=True))
    assert sum(lengths) <= max_drafts
    others = [d for d in product(*(range(num + 1) for num in most)) if sum(d) <= max_drafts]
    best = max(speed(d, rates, len(rates), step_s, row_s) for d in others)
    chosen = speed(lengths, rates, len(rates), step_s, row_s)
    if any(lengths):
        assert chosen > best * (1 - 1e-9)
    else:
        assert best < 1.05 * chosen * (1 + 1e-9)


def test_nothing_is_drafted_where_a_row_costs_as_much_as_a_token():
    assert draft_lengths([0.99] * 4, [8] * 4, num_rows=4, max_drafts=32, step_s=0.4, row_s=0.1) == [0] * 4


def test_rows_go_to_the_sequences_whose_guesses_are_right():
    lengths = draft_lengths([0.95, 0.1, 0.6], [8, 8, 8], num_rows=3, max_drafts=64, step_s=6.0, row_s=0.4)
    assert lengths[0] == 8
    assert lengths[1] == 0
    assert 1 <= lengths[2] <= 4
