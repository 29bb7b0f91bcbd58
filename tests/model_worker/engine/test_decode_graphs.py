"""Replays equal eager steps, whatever the batch: they read nothing but static memory."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
import torch

from model_worker.engine.batch_builder import BatchBuilder
from model_worker.engine.decode_graphs import DecodeGraphs, bucket_sizes
from model_worker.engine.lora.variant import Variant
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.step import ScheduledSequence, SchedulerOutput
from model_worker.engine.step_inputs import BatchShape, DeviceInputs
from model_worker.engine.step_runner import BoundVariants, StepRunner
from registry.progress import CountProgress
from tests.fakes.device_model import DeviceModel, FakeCapture, Offset

BLOCK_SIZE = 4
MAX_BLOCKS = 5
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (24, (1, 2, 4, 8, 16, 24)),
        (100, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)),
    ],
)
def test_buckets(max_num_seqs: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(max_num_seqs) == sizes


class Runs:
    """The same model twice: with graphs, and eager."""

    def __init__(self, *, max_num_seqs: int = 11, num_groups: int = 1) -> None:
        self.models = [DeviceModel(num_blocks=120, block_size=BLOCK_SIZE, num_groups=num_groups) for _ in range(2)]
        num_bytes = BatchShape(num_groups, 64, 16, MAX_BLOCKS, 64).num_bytes
        self.drawn = [torch.zeros(16, dtype=torch.int64) for _ in range(2)]
        self.inputs = [DeviceInputs(CPU, num_bytes) for _ in range(2)]
        self.capture = FakeCapture(self.models[0].context)
        self.graphs = DecodeGraphs(
            self.models[0],
            self.inputs[0],
            self.drawn[0],
            max_num_seqs=max_num_seqs,
            num_groups=num_groups,
            max_blocks=MAX_BLOCKS,
            capture=self.capture,
        )
        self.runners = [
            StepRunner(
                cast(Any, model),
                cast(Any, None),
                CPU,
                inputs=self.inputs[i],
                graphs=self.graphs if i == 0 else None,
                drawn=self.drawn[i],
            )
            for i, model in enumerate(self.models)
        ]
        self.builders = [BatchBuilder(BLOCK_SIZE, num_groups) for _ in range(2)]

    def step(self, items: list[ScheduledSequence], bound: BoundVariants | None = None) -> list[int]:
        """-> the tokens with the largest logits, equal for both"""
        found = []
        for runner, builder in zip(self.runners, self.builders, strict=True):
            batch = builder.build(SchedulerOutput(tuple(items)))
            hidden = runner.forward(batch, bound or {})
            logits = runner.logits(batch, hidden, bound or {})
            assert logits.isfinite().all()
            found.append(logits.to(torch.float32, copy=True))  # as graphs give them
            runner.remember(logits.argmax(dim=1))
        assert torch.equal(*found)
        return cast("list[int]", found[0].argmax(dim=1).tolist())


def make_sequences(num: int, *, num_groups: int = 1, variants: list[Variant | None] | None = None) -> list[Sequence]:
    """Of 1 to 9 tokens, with blocks for twenty, none shared."""
    draw = random.Random(num)
    blocks = list(range(120))
    draw.shuffle(blocks)
    sequences = []
    for i in range(num):
        variant = None if variants is None else variants[i]
        prompt = [draw.randrange(50) for _ in range(draw.randint(1, 9))]
        sequence = Sequence(i, 0, prompt, SamplingParams(), seed=0, variant=variant)
        sequence.block_tables = [[blocks.pop() for _ in range(MAX_BLOCKS)] for _ in range(num_groups)]
        sequences.append(sequence)
    return sequences


def prompts(sequences: list[Sequence]) -> list[ScheduledSequence]:
    return [ScheduledSequence(s, 0, s.num_tokens, (s,)) for s in sequences]


def decodes(sequences: list[Sequence]) -> list[ScheduledSequence]:
    return [ScheduledSequence(s, s.num_tokens - 1, 1, (s,)) for s in sequences]


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("num_seqs", [1, 2, 3, 5, 8, 9, 11])
def test_any_number_of_rows_is_replayed_with_the_next_larger_graph(num_seqs: int, num_groups: int) -> None:
    runs = Runs(num_groups=num_groups)
    runs.graphs.capture()
    captured = len(runs.models[0].batch_sizes)
    sequences = make_sequences(num_seqs, num_groups=num_groups)
    tokens = runs.step(prompts(sequences))
    for _ in range(4):
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token)
        tokens = runs.step(decodes(sequences))
    bucket = min(size for size in bucket_sizes(11) if size >= num_seqs)
    assert runs.models[0].batch_sizes[captured + 1 :] == [bucket] * 4
    assert runs.capture.num_replays == 4


def test_pending_tokens_are_found_in_what_was_drawn_last() -> None:
    runs = Runs()
    runs.graphs.capture()
    sequences = make_sequences(6)
    tokens = runs.step(prompts(sequences))
    known: list[list[int]] = [[token] for token in tokens]
    for step in range(5):
        order = random.Random(step).sample(range(6), 6)  # not that in which they were drawn
        for sequence in sequences:
            sequence.expect()
        tokens = runs.step(decodes([sequences[i] for i in order]))
        for i, sequence in enumerate(sequences):
            sequence.append(known[i][-1])
        for i, token in zip(order, tokens, strict=True):
            known[i].append(token)
    eager = Runs()
    others = make_sequences(6)
    tokens = eager.step(prompts(others))
    for step in range(5):
        assert tokens == [ids[step] for ids in known]
        for other, token in zip(others, tokens, strict=True):
            other.append(token)
        tokens = eager.step(decodes(others))
    assert runs.capture.num_replays == 5
    assert eager.capture.num_replays == 0


def test_one_graph_serves_any_mix_of_variants() -> None:
    a, b, odd = Variant(3, "a"), Variant(5, "b"), Variant(7, "odd")
    bound: dict[int, Any] = {3: Offset(0.5), 5: Offset(-2.0), 7: Offset(1.0, in_graphs=False)}
    runs = Runs()
    runs.graphs.capture()
    for variants, replays in (([None, a, a, b], 1), ([b, b, b], 1), ([None] * 4, 1), ([a, odd], 0), ([a] * 5, 1)):
        before = runs.capture.num_replays
        sequences = make_sequences(len(variants), variants=variants)
        for sequence, token in zip(sequences, runs.step(prompts(sequences), bound), strict=True):
            sequence.append(token)
        runs.step(decodes(sequences), bound)
        assert runs.capture.num_replays - before == replays


def test_steps_with_prompts_or_more_rows_are_computed_eagerly() -> None:
    runs = Runs(max_num_seqs=4)
    runs.graphs.capture()
    sequences = make_sequences(5)
    for sequence, token in zip(sequences, runs.step(prompts(sequences)), strict=True):
        sequence.append(token)
    runs.step(decodes(sequences))
    runs.step([*decodes(sequences[:2]), ScheduledSequence(sequences[2], 0, 2)])
    assert runs.capture.num_replays == 0


def test_a_row_from_which_nothing_is_sampled_is_computed_eagerly() -> None:
    runs = Runs()
    runs.graphs.capture()
    sequences = make_sequences(3)
    for sequence, token in zip(sequences, runs.step(prompts(sequences)), strict=True):
        sequence.append(token)
    runs.step([*decodes(sequences[:2]), ScheduledSequence(sequences[2], 0, 1)])  # a chunk of a prompt
    assert runs.capture.num_replays == 0


def test_what_earlier_steps_left_in_the_inputs_is_not_computed() -> None:
    runs = Runs()
    runs.inputs[0]._device_buffer.fill_(0x7F)
    runs.graphs.capture()
    sequences = make_sequences(5)
    for sequence, token in zip(sequences, runs.step(prompts(sequences)), strict=True):
        sequence.append(token)
    runs.step(decodes(sequences))
    assert runs.capture.num_replays == 1


def test_progress_and_some_graphs_only() -> None:
    runs = Runs(max_num_seqs=20)
    lines: list[str] = []
    assert runs.graphs.num_graphs == 12
    runs.graphs.capture(most=1)
    assert runs.capture.num_captured == 2
    assert runs.models[0].batch_sizes == [20, 20]
    runs.graphs.capture(CountProgress("graphs", lines.append))
    assert runs.capture.num_captured == 12
    assert lines[0] == "graphs: 2 of 12"
    assert lines[-1] == "graphs: 12 of 12"
    runs.graphs.clear()
    runs.graphs.capture()
    assert runs.capture.num_captured == 24
