import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from model_worker.engine import sampler as sampler_module, token_draw, top_tokens
from model_worker.engine.outputs import SampledToken
from model_worker.engine.random_stream import uniform
from model_worker.engine.sampler import Sampler
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from registry.errors import InternalError, InvalidRequestError
from tests.model_worker.engine.reference_sampler import reference_draw, reference_kept, reference_logits

torch.set_num_threads(1)


def make_sequence(prompt=(1, 2, 3), output=(), seed=0, **sampling) -> Sequence:
    sequence = Sequence(0, 0, list(prompt), SamplingParams(**sampling), seed=seed)
    for token_id in output:
        sequence.append(token_id)
    return sequence


def tokens_of(sampled) -> list[int]:
    assert all(isinstance(item, SampledToken) for item in sampled), sampled
    return [item.token_id for item in sampled]


@st.composite
def sampling_params(draw, vocab_size: int) -> SamplingParams:
    def usually(off, strategy):
        return draw(st.one_of(st.just(off), strategy))

    token_id = st.integers(0, vocab_size - 1)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-7, 0.3, 1.0, 1.0, 2.5, 100.0])),
        top_p=usually(1.0, st.sampled_from([1e-9, 0.2, 0.5, 0.9, 0.999])),
        top_k=usually(0, st.integers(1, vocab_size + 5)),
        min_p=usually(0.0, st.sampled_from([0.01, 0.3, 1.0])),
        repetition_penalty=usually(1.0, st.sampled_from([0.5, 1.2, 3.0])),
        presence_penalty=usually(0.0, st.sampled_from([-2.0, 0.7])),
        frequency_penalty=usually(0.0, st.sampled_from([-1.0, 1.5])),
        logit_bias=usually({}, st.dictionaries(token_id, st.sampled_from([-100.0, -1.0, 3.0]), max_size=4)),
        min_tokens=usually(0, st.just(3)),
        stop_token_ids=usually((), st.just((vocab_size - 1,))),
        logprobs=usually(None, st.integers(0, 5)),
    )


@settings(max_examples=250, deadline=None)
@given(data=st.data(), vocab_size=st.sampled_from([3, 40, 300, 700]), logits_seed=st.integers(0, 10**6))
@pytest.mark.parametrize("small_blocks", [False, True])
def test_every_row_is_what_the_reference_draws(small_blocks, data, vocab_size, logits_seed):
    generator = torch.Generator().manual_seed(logits_seed)
    num_rows = data.draw(st.integers(1, 5))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * data.draw(st.sampled_from([0.0, 1.0, 6.0]))
    logits = logits.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=6)
    sequences = [
        make_sequence(data.draw(ids) or [0], data.draw(ids), seed=data.draw(st.integers(0, 2**64 - 1)))
        for _ in range(num_rows)
    ]
    for sequence in sequences:
        sequence.sampling = data.draw(sampling_params(vocab_size))
    eos = (1,)
    with pytest.MonkeyPatch.context() as patch:
        if small_blocks:  # so that pruning, retries and the histogram are reached with a small vocabulary
            patch.setattr(top_tokens, "_BLOCK", 3)
            patch.setattr(top_tokens, "_GROWTH", 2)
            patch.setattr(token_draw, "_BLOCK", 16)
            patch.setattr(token_draw, "_MAX_SORTED", 8)
            patch.setattr(token_draw, "_NUM_EDGE_CANDIDATES", 2)
            patch.setattr(sampler_module, "_NUM_CANDIDATES", 4)
        sampled = Sampler(vocab_size, eos).sample(logits.clone(), sequences)
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        processed = reference_logits(logits[row], sequence, eos)
        kept, weights = reference_kept(processed, sequence)
        random = uniform([sequence.seed], [sequence.num_tokens])[0]
        by_probability = reference_draw(kept, weights, random)
        by_id = reference_draw(*zip(*sorted(zip(kept, weights, strict=True)), strict=True), random)
        if sampling.greedy:
            allowed = {kept[0]}
        elif 0 < sampling.top_k < vocab_size:
            allowed = {by_probability}
        elif sampling.top_p == 1.0:
            allowed = {by_id}
        else:
            allowed = {by_probability, by_id} if small_blocks else {by_probability}
        assert sampled[row].token_id in allowed
        assert (sampled[row].logprobs is None) is (sampling.logprobs is None)


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; tokens that cannot be drawn must not have been."""
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 15, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
@pytest.mark.parametrize("by_histogram", [False, True])
def test_frequencies_are_the_probabilities(monkeypatch, sampling, by_histogram):
    if by_histogram:
        monkeypatch.setattr(token_draw, "_MAX_SORTED", 0)
        monkeypatch.setattr(sampler_module, "_NUM_CANDIDATES", 1)
    num_draws, vocab_size = 4000, 24
    row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    sequences = [make_sequence(seed=seed, **sampling) for seed in range(num_draws)]
    drawn = tokens_of(Sampler(vocab_size, ()).sample(row.repeat(num_draws, 1), sequences))
    kept, weights = reference_kept(row, sequences[0])
    expected = torch.zeros(vocab_size, dtype=torch.float64)
    expected[kept] = torch.tensor(weights, dtype=torch.float64) / sum(weights) * num_draws
    statistic, freedom = chi_square(torch.bincount(torch.tensor(drawn), minlength=vocab_size).double(), expected)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def mixed_batch(vocab_size: int) -> list[Sequence]:
    return [
        make_sequence(seed=1, temperature=0.0),
        make_sequence(seed=2),
        make_sequence(seed=3, top_k=50, top_p=0.9),
        make_sequence(seed=4, top_p=0.5),
        make_sequence(seed=5, top_p=0.99, temperature=3.0),
        make_sequence(seed=6, min_p=0.05),
        make_sequence(seed=7, top_k=3000),
        make_sequence(seed=8, repetition_penalty=1.2, output=(5, 6, 5), frequency_penalty=0.5, logprobs=3),
        make_sequence(seed=9, temperature=0.0, min_tokens=4, logit_bias={7: 2.0}, logprobs=0),
        make_sequence(seed=10, top_p=0.9999, min_p=1e-6, temperature=2.0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_order_and_batch_size_do_not_change_a_row(dtype):
    vocab_size = 20_000
    sampler = Sampler(vocab_size, (2,))
    sequences = mixed_batch(vocab_size)
    logits = (torch.randn(len(sequences), vocab_size, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    together = sampler.sample(logits.clone(), sequences)
    alone = [sampler.sample(logits[row : row + 1].clone(), [sequence])[0] for row, sequence in enumerate(sequences)]
    assert together == alone
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sampler.sample(logits[order].clone(), [sequences[row] for row in order])
    assert shuffled == [together[row] for row in order]
    twice = sampler.sample(logits.repeat(2, 1), sequences * 2)
    assert twice == together * 2


def test_a_draw_depends_on_seed_and_position():
    vocab_size, logits = 1000, torch.zeros(1, 1000)
    sampler = Sampler(vocab_size, ())
    by_seed = [tokens_of(sampler.sample(logits.clone(), [make_sequence(seed=seed)]))[0] for seed in range(20)]
    by_length = [
        tokens_of(sampler.sample(logits.clone(), [make_sequence(prompt=range(1, length))]))[0]
        for length in range(2, 22)
    ]
    assert len(set(by_seed)) > 15
    assert len(set(by_length)) > 15
    # What was prompt and what was output makes no difference to the random stream.
    as_prompt = make_sequence(prompt=(1, 2, 3, 4), seed=7)
    as_output = make_sequence(prompt=(1, 2), output=(3, 4), seed=7)
    assert sampler.sample(logits.clone(), [as_prompt]) == sampler.sample(logits.clone(), [as_output])


def test_greedy_takes_the_lowest_of_equal_ids_and_honours_bias_and_min_tokens():
    logits = torch.zeros(3, 300)
    logits[:, [40, 90]] = 5.0
    sequences = [
        make_sequence(temperature=0.0),
        make_sequence(temperature=0.0, logit_bias={200: 6.0}),
        make_sequence(temperature=0.0, min_tokens=1, stop_token_ids=(90,)),
    ]
    assert tokens_of(Sampler(300, (40,)).sample(logits, sequences)) == [40, 200, 0]


def test_min_tokens_is_over_after_that_many_and_ignore_eos_does_not_forbid_eos():
    logits = torch.zeros(2, 10)
    logits[:, 4] = 50.0
    sequences = [make_sequence(output=(1, 1), min_tokens=2), make_sequence(ignore_eos=True)]
    assert tokens_of(Sampler(10, (4,)).sample(logits, sequences)) == [4, 4]


def test_top_k_one_is_greedy_in_ties_too():
    logits = torch.zeros(4, 5000)
    logits[:, [17, 3000]] = 1.0
    sequences = [make_sequence(seed=seed, top_k=1) for seed in range(4)]
    assert tokens_of(Sampler(5000, ()).sample(logits, sequences)) == [17] * 4


def test_equal_logits_everywhere_are_cut_exactly():
    """The hardest case for candidates: everything ties, so nothing is settled until all is looked at."""
    num_draws, vocab_size = 300, 6000
    sequences = [make_sequence(seed=seed, top_k=10) for seed in range(num_draws)]
    assert set(tokens_of(Sampler(vocab_size, ()).sample(torch.zeros(num_draws, vocab_size), sequences))) == set(
        range(10)
    )
    sequences = [make_sequence(seed=seed, top_p=0.25) for seed in range(num_draws)]
    drawn = tokens_of(Sampler(vocab_size, ()).sample(torch.zeros(num_draws, vocab_size), sequences))
    assert 1400 < max(drawn) < 1500


@pytest.mark.parametrize("num_top", [0, 1, 7, 20])
def test_logprobs_are_log_softmax_of_the_raw_logits(num_top):
    vocab_size = 600
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    sequences = [
        make_sequence(temperature=0.0, logprobs=num_top, logit_bias={9: 50.0}),
        make_sequence(temperature=0.2, top_k=4, logprobs=num_top, repetition_penalty=3.0),
        make_sequence(seed=5),
    ]
    sampled = Sampler(vocab_size, ()).sample(logits.clone(), sequences)
    assert sampled[0].token_id == 9
    assert sampled[2].logprobs is None
    expected = logits.float().log_softmax(dim=1)
    for row in range(2):
        found = sampled[row].logprobs
        assert found.token_id == sampled[row].token_id
        assert found.logprob == pytest.approx(expected[row, found.token_id].item(), abs=1e-6)
        best = expected[row].sort(descending=True, stable=True)
        assert [top.token_id for top in found.top] == best.indices[:num_top].tolist()
        assert [top.logprob for top in found.top] == pytest.approx(best.values[:num_top].tolist(), abs=1e-6)


def test_prompt_logprobs_are_log_softmax_and_leave_the_logits_alone():
    logits = torch.randn(150, 90, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    token_ids = [row % 90 for row in range(150)]
    found = Sampler(90, ()).prompt_logprobs(logits, token_ids, 2)
    assert torch.equal(logits, before)
    expected = logits.log_softmax(dim=1)
    assert [item.token_id for item in found] == token_ids
    for row, item in enumerate(found):
        assert item.logprob == pytest.approx(expected[row, token_ids[row]].item(), abs=1e-6)
        assert [top.token_id for top in item.top] == expected[row].topk(2).indices.tolist()


def test_tokens_that_the_model_rules_out_are_not_listed():
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [3, 4]] = torch.tensor([1.0, 0.0])
    sampled = Sampler(50, ()).sample(logits, [make_sequence(temperature=0.0, logprobs=5)])
    assert [top.token_id for top in sampled[0].logprobs.top] == [3, 4]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("neighbour", [{"temperature": 0.0}, {"min_tokens": 2}, {"top_p": 0.5}], ids=str)
def test_logits_that_are_not_finite_fail_their_own_row_only(broken, neighbour):
    logits = torch.zeros(4, 300)
    logits[:, 8] = 40.0
    logits[1] = broken
    if not broken < 0:
        logits[2, 5] = broken
    else:
        logits[2] = broken
    sequences = [
        make_sequence(**neighbour, logprobs=1),
        make_sequence(**neighbour, logprobs=1),
        make_sequence(temperature=1.0, logit_bias={1: 2.0}),
        make_sequence(temperature=0.0),
    ]
    sampled = Sampler(300, (0,)).sample(logits, sequences)
    assert [isinstance(item, InternalError) for item in sampled] == [False, True, True, False]
    assert "--dtype bfloat16" in sampled[1].message
    assert sampled[1] is not sampled[2]
    assert sampled[0].token_id == sampled[3].token_id == 8
    assert sampled[0].logprobs.token_id == 8


def test_forbidding_every_token_is_the_fault_of_the_request():
    sequences = [make_sequence(min_tokens=1, stop_token_ids=(0, 1)), make_sequence(min_tokens=1, temperature=0.0)]
    sampled = Sampler(3, (2,)).sample(torch.zeros(2, 3), sequences)
    assert isinstance(sampled[0], InvalidRequestError)
    assert sampled[1].token_id == 0


def test_an_empty_batch_gives_nothing():
    assert Sampler(5, ()).sample(torch.empty(0, 5), []) == []
    assert Sampler(5, ()).prompt_logprobs(torch.empty(0, 5), [], 3) == []


def test_end_of_sequence_ids_outside_the_vocabulary_are_harmless():
    logits = torch.zeros(2, 5)
    sequences = [make_sequence(temperature=0.0, min_tokens=1), make_sequence(temperature=0.0)]
    assert tokens_of(Sampler(5, (0, 5, 50256)).sample(logits, sequences)) == [1, 0]
