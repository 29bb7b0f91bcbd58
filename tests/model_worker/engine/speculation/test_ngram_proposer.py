from hypothesis import given, settings, strategies as st

from model_worker.engine.speculation.ngram_proposer import NgramProposer


def searched(token_ids: list[int], num_tokens: int, min_tokens: int, max_tokens: int) -> list[int]:
    """What NgramProposer promises, by looking at all places that it may try."""

    def matches(end: int, n: int) -> bool:
        return n <= end and token_ids[end - n : end] == token_ids[-n:]

    places = [end for end in range(len(token_ids) - 1, 0, -1) if matches(end, min_tokens)][:16]
    for n in range(max_tokens, min_tokens - 1, -1):
        for end in places:
            if matches(end, n):
                text = token_ids.copy()
                while len(text) < len(token_ids) + num_tokens:
                    text.append(text[end + len(text) - len(token_ids)])
                return text[len(token_ids) :]
    return []


@settings(max_examples=300, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=120),
    arrivals=st.lists(st.integers(1, 15), min_size=1, max_size=20),
    min_tokens=st.integers(1, 3),
    further=st.integers(0, 3),
    num_tokens=st.integers(1, 9),
)
def test_proposals_are_those_of_a_search(token_ids, arrivals, min_tokens, further, num_tokens):
    proposer = NgramProposer(min_tokens, min_tokens + further)
    end = 0
    for num in arrivals:  # as a sequence grows: by one token a step, or by several when drafts are accepted
        end = min(end + num, len(token_ids))
        known = token_ids[:end]
        expected = searched(known, num_tokens, min_tokens, min_tokens + further)
        assert proposer.propose(known, num_tokens) == expected
        assert proposer.propose(known, num_tokens) == expected  # nothing has come since


def test_the_longer_match_goes_before_the_later_one():
    proposer = NgramProposer(1, 3)
    assert proposer.propose([1, 2, 3, 50, 9, 3, 60, 1, 2, 3], 2) == [50, 9]


def test_of_equal_matches_the_latest_counts():
    assert NgramProposer(2, 2).propose([1, 2, 50, 1, 2, 60, 1, 2], 1) == [60]


def test_a_short_period_goes_on_for_as_long_as_asked():
    assert NgramProposer(1, 2).propose([7, 8, 7, 8, 7], 5) == [8, 7, 8, 7, 8]


def test_new_tokens_propose_nothing():
    assert NgramProposer(2, 4).propose([1, 2, 3, 4, 5], 4) == []
    assert NgramProposer(2, 4).propose([1], 4) == []


def test_a_long_prompt_is_entered_in_pieces():
    prompt = list(range(1000)) * 2
    proposer = NgramProposer(2, 4)
    calls = [proposer.propose(prompt, 2, max_entered=256) for _ in range(8)]
    assert calls == [[]] * 7 + [[0, 1]]
