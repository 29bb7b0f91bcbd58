import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from model_worker.engine.logits_processing import needs_processing, process_logits
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence

torch.set_num_threads(1)
VOCAB_SIZE = 50


def make_sequence(prompt=(1, 2, 3), output=(), **sampling) -> Sequence:
    sequence = Sequence(0, 0, list(prompt), SamplingParams(**sampling), seed=0)
    for token_id in output:
        sequence.append(token_id)
    return sequence


def some_logits(num_rows: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 4


def processed(sequence: Sequence, eos: tuple[int, ...] = (0,)) -> torch.Tensor:
    logits = some_logits()
    process_logits(logits, [sequence], eos)
    return logits


def test_repetition_penalty_is_that_of_transformers():
    for penalty in (0.5, 1.3, 5.0):
        sequence = make_sequence(prompt=(4, 4, 7, 9), output=(9, 11, 11), repetition_penalty=penalty)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([sequence.token_ids]), some_logits())
        assert torch.equal(processed(sequence), expected)


def test_min_tokens_is_that_of_transformers():
    for num_output, masked in ((0, True), (2, True), (3, False)):
        sequence = make_sequence(output=(5,) * num_output, min_tokens=3, stop_token_ids=(8,))
        processor = MinNewTokensLengthLogitsProcessor(3, 3, [0, 8], device="cpu")
        expected = processor(torch.tensor([sequence.token_ids]), some_logits())
        assert torch.equal(processed(sequence), expected)
        assert needs_processing(sequence) is masked


def test_logit_bias_is_that_of_transformers():
    bias = {3: 2.5, 49: -100.0, 0: 100.0}
    expected = SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in bias.items()})(
        torch.tensor([[1, 2]]), some_logits()
    )
    assert torch.equal(processed(make_sequence(logit_bias=bias)), expected)


def test_presence_and_frequency_count_the_output_only():
    sequence = make_sequence(prompt=(1, 2), output=(2, 5, 5, 5), presence_penalty=0.5, frequency_penalty=-0.25)
    expected = some_logits()
    expected[0, 2] -= 0.5 - 0.25
    expected[0, 5] -= 0.5 - 0.75
    assert torch.equal(processed(sequence), expected)


def test_order_is_mask_then_bias_then_penalties():
    sequence = make_sequence(
        prompt=(4,),
        output=(4,),
        min_tokens=5,
        logit_bias={0: 100.0, 4: -10.0},
        repetition_penalty=2.0,
        presence_penalty=1.0,
    )
    logits = torch.full((1, VOCAB_SIZE), 3.0)
    process_logits(logits, [sequence], (0,))
    assert logits[0, 0] == -torch.inf
    assert logits[0, 4] == (3.0 - 10.0) * 2.0 - 1.0
    assert logits[0, 1:4].tolist() == [3.0] * 3


def test_rows_are_independent_and_untouched_rows_stay():
    sequences = [
        make_sequence(),
        make_sequence(output=(5,), repetition_penalty=1.5, logit_bias={2: 1.0}),
        make_sequence(output=(6, 6), frequency_penalty=1.0),
        make_sequence(min_tokens=1),
        make_sequence(prompt=(9,), repetition_penalty=0.7),
    ]
    raw = some_logits(len(sequences))
    together = raw.clone()
    process_logits(together, sequences, (0, 49))
    for row, sequence in enumerate(sequences):
        alone = raw[row : row + 1].clone()
        process_logits(alone, [sequence], (0, 49))
        assert torch.equal(together[row : row + 1], alone)
        assert torch.equal(alone, raw[row : row + 1]) is not needs_processing(sequence)


def test_extreme_penalties_make_neither_nan_nor_plus_infinity():
    logits = torch.tensor([[3e38, -3e38, 0.0, -torch.inf]])
    for penalty in (1e-300, 1e-40, 1e300):
        changed = logits.clone()
        process_logits(changed, [make_sequence(prompt=(0, 1, 2, 3), repetition_penalty=penalty)], ())
        assert not changed.isnan().any()
        assert changed.max() < torch.inf


def test_the_ids_of_the_prompt_are_collected_once():
    sequence = make_sequence(prompt=(3, 3, 1), repetition_penalty=2.0)
    processed(sequence)
    collected = sequence.prompt_unique_ids
    assert sorted(collected) == [1, 3]
    sequence.append(20)
    expected = some_logits()
    expected[0, [1, 3, 20]] = torch.where(
        expected[0, [1, 3, 20]] > 0, expected[0, [1, 3, 20]] / 2, expected[0, [1, 3, 20]] * 2
    )
    assert torch.equal(processed(sequence), expected)
    assert sequence.prompt_unique_ids is collected
