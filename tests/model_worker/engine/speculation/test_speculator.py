"""The policy against simulated text and a simulated clock: what it gains where it pays, and costs where it does not."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import pytest

from model_worker.engine.config import SpeculationConfig
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.speculation.sequence_drafter import num_leading_equal
from model_worker.engine.speculation.speculator import Speculator

PROMPT = 200
OUTPUT = 600


@dataclass
class Machine:
    """Steps take fixed_s + row_s * rows; as measured, up to a fifth more, and a tenth of them twice as long."""

    fixed_s: float
    row_s: float

    def __post_init__(self) -> None:
        self._random = random.Random(5)

    def step_s(self, num_rows: int) -> float:
        return self.fixed_s + self.row_s * num_rows

    def measured_s(self, num_rows: int) -> float:
        stall = 2.0 if self._random.random() < 0.1 else 1.0
        return self.step_s(num_rows) * (1.0 + 0.2 * self._random.random()) * stall


def random_text(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(PROMPT + OUTPUT)]


def copied_text(seed: int) -> list[int]:
    """The answer is the prompt, over and over."""
    return random_text(seed)[:PROMPT] * (1 + OUTPUT // PROMPT)


def chat_text(seed: int) -> list[int]:
    """Few words in a random order: their pairs come back, and what follows them is right by chance only."""
    generator = random.Random(seed)
    return [generator.randrange(12) for _ in range(PROMPT + OUTPUT)]


def run(texts: SequenceOf[list[int]], machine: Machine) -> tuple[float, int]:
    """Decode all texts in one batch. -> how many times faster than without speculation, and the number of drafts"""
    speculator = Speculator(SpeculationConfig(num_speculative_tokens=8))
    sampling = SamplingParams(max_tokens=OUTPUT)
    sequences = [Sequence(i, 0, text[:PROMPT], sampling, seed=0) for i, text in enumerate(texts)]
    running = list(sequences)
    spent_s = 0.0
    num_drafts = 0
    while running:
        drafts = speculator.draft(running, max_drafts=512)
        num_rows = len(running) + sum(map(len, drafts))
        num_drafts += num_rows - len(running)
        spent_s += machine.step_s(num_rows)
        speculator.step_time.observe(num_rows, machine.measured_s(num_rows))
        for sequence, guesses in zip(running, drafts, strict=True):
            coming = texts[sequence.seq_id][sequence.num_tokens :]
            num_right = num_leading_equal(guesses, coming)
            assert num_right < sequence.num_tokens_left
            for token_id in coming[: num_right + 1]:
                sequence.append(token_id)
        running = [sequence for sequence in running if sequence.num_tokens_left]
    assert [sequence.token_ids for sequence in sequences] == texts
    return OUTPUT * machine.step_s(len(texts)) / spent_s, num_drafts


SMALL_MODEL_ON_CPU = (0.0066, 0.0004)
ROWS_ARE_FREE = (0.01, 0.0)
ROWS_ARE_ALL = (0.0001, 0.005)


@pytest.mark.parametrize(("num_streams", "at_least"), [(1, 4.0), (8, 2.0)])
def test_copying_gains(num_streams: int, at_least: float) -> None:
    speedup, _ = run([copied_text(i) for i in range(num_streams)], Machine(*SMALL_MODEL_ON_CPU))
    assert speedup > at_least


@pytest.mark.parametrize("num_streams", [1, 8, 32])
@pytest.mark.parametrize("machine", [SMALL_MODEL_ON_CPU, ROWS_ARE_FREE, ROWS_ARE_ALL])
@pytest.mark.parametrize("text", [random_text, chat_text, copied_text])
def test_nowhere_costs_more_than_two_percent(num_streams, machine, text) -> None:
    speedup, _ = run([text(i) for i in range(num_streams)], Machine(*machine))
    assert speedup > 0.98


def test_off_where_rows_are_dear() -> None:
    _, num_drafts = run([copied_text(i) for i in range(8)], Machine(*ROWS_ARE_ALL))
    assert num_drafts < 0.02 * 8 * OUTPUT  # a few rows from time to time, to see whether it is still so


def test_only_the_sequence_that_repeats_itself_gets_drafts() -> None:
    texts = [random_text(0), copied_text(1), random_text(2)]
    speedup, num_drafts = run(texts, Machine(*SMALL_MODEL_ON_CPU))
    assert speedup > 0.98
    assert num_drafts > 0.8 * OUTPUT


def test_comes_back_when_a_text_begins_to_repeat_itself() -> None:
    turn = PROMPT + OUTPUT // 2
    words = chat_text(3)[:turn]
    text = words + words[: OUTPUT - OUTPUT // 2]
    speedup, num_drafts = run([text], Machine(fixed_s=0.010, row_s=0.003))
    assert speedup > 1.1
    assert num_drafts > 100


def test_never_more_than_a_sequence_may_have() -> None:
    sampling = SamplingParams(max_tokens=3)
    sequence = Sequence(0, 0, [1, 2, 3, 4] * 3, sampling, seed=0)
    speculator = Speculator(SpeculationConfig(num_speculative_tokens=8))
    assert speculator.draft([sequence], max_drafts=64) == [[1, 2]]
    sequence.append(1)
    assert speculator.draft([sequence], max_drafts=64) == [[2]]
    sequence.append(2)
    assert speculator.draft([sequence], max_drafts=64) == [[]]


def test_the_step_has_room_for_so_many_only() -> None:
    sequence = Sequence(0, 0, [1, 2, 3, 4] * 3, SamplingParams(max_tokens=50), seed=0)
    assert Speculator(SpeculationConfig()).draft([sequence], max_drafts=2) == [[1, 2]]
    assert Speculator(SpeculationConfig()).draft([sequence], max_drafts=0) == [[]]
