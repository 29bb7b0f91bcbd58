"""How the tokens of a step are divided among streams and prompts."""

from __future__ import annotations

from model_worker.engine.visibility import Visibility
from tests.fakes.scheduler_harness import SchedulerHarness, chunks_of, expected_output


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    harness = SchedulerHarness()
    short = harness.add([1, 2], max_tokens=20)
    harness.step()
    harness.add(list(range(60)), max_tokens=1)
    outputs = [harness.step() for _ in range(4)]
    assert [output.num_tokens for output in outputs] == [16, 16, 16, 16]
    assert all(output.scheduled[0].sequence is short.sequences[0] for output in outputs)
    assert [bool(output.scheduled[1].sampled) for output in outputs] == [False, False, False, True]


def test_beside_streams_prompts_get_a_bounded_share_and_alone_the_whole_step() -> None:
    harness = SchedulerHarness(max_num_batched_tokens=40, max_mixed_prefill_tokens=8)
    harness.add(list(range(100)), max_tokens=1, name="alone")
    assert chunks_of(harness.step()) == {"alone": 40}
    harness.run()
    streams = [harness.add([i], max_tokens=30, name=f"s{i}") for i in range(3)]
    harness.step()
    harness.add(list(range(100, 160)), max_tokens=1, name="long")
    for _ in range(7):
        assert chunks_of(harness.step()) == {"s0": 1, "s1": 1, "s2": 1, "long": 8}
    assert all(stream.sequences[0].num_output_tokens == 8 for stream in streams)


def test_a_crowd_of_prompts_gets_a_larger_share_than_one_beside_the_same_streams() -> None:
    harness = SchedulerHarness(max_num_batched_tokens=64, max_mixed_prefill_tokens=8, num_blocks=200)
    for i in range(2):
        harness.add([i], max_tokens=30)
    harness.step()
    for i in range(5):
        harness.add([i] * 40, max_tokens=1)
    assert harness.step().num_tokens == 2 + 8 * 5 // 2
    for i in range(20):  # those that find no place in the batch do not count: 5 of 8 are taken by now
        harness.add([i] * 40, max_tokens=1)
    assert harness.step().num_tokens == 2 + 8 * 6 // 2


def test_short_prompts_pass_a_long_one_that_keeps_half_of_the_share() -> None:
    harness = SchedulerHarness(max_num_batched_tokens=16, num_blocks=100)
    harness.add(list(range(100)), max_tokens=1, name="long")
    harness.step()
    harness.add(list(range(100, 170)), max_tokens=1, name="second")
    for i in range(3):
        harness.add([i] * 6, max_tokens=1, name=f"short{i}")
    assert chunks_of(harness.step()) == {"long": 8, "short0": 6, "short1": 2}
    assert chunks_of(harness.step()) == {"long": 8, "short1": 4, "short2": 4}
    # What no shorter one takes goes to that with the fewest tokens left: the second has 70, the long one 60 of 100.
    assert chunks_of(harness.step()) == {"long": 14, "short2": 2}


def test_prompts_of_equal_length_are_computed_one_after_the_other() -> None:
    harness = SchedulerHarness(max_num_batched_tokens=16)
    for name in ("a", "b"):
        harness.add([ord(name)] * 40, max_tokens=1, name=name)
    assert [chunks_of(harness.step()) for _ in range(5)] == [
        {"a": 16},
        {"a": 16},
        {"a": 8, "b": 8},
        {"b": 16},
        {"b": 16},
    ]


def test_a_shared_prefix_is_computed_once() -> None:
    harness = SchedulerHarness()
    harness.add(list(range(13)), max_tokens=1)
    harness.run()
    harness.add(list(range(13)), max_tokens=1)
    output = harness.step()
    assert output.scheduled[0].start == 12
    assert (harness.scheduler.num_prefix_queried_tokens, harness.scheduler.num_prefix_hit_tokens) == (26, 12)


def test_windowed_layers_let_a_sequence_hold_a_bounded_number_of_blocks() -> None:
    """Prompts of any length too: their blocks are taken and given back as they advance."""
    windowed = (Visibility(sliding_window=8),)
    harness = SchedulerHarness(num_blocks=8, groups=windowed, max_num_batched_tokens=16)
    assert harness.manager.num_blocks_for(10_000) == 8
    assert harness.manager.longest_sequence(10_000) == 10_000
    group = harness.add([3] * 80, max_tokens=60)
    used = []
    while harness.scheduler.has_unfinished:
        harness.step()
        used.append(harness.manager.num_used_blocks)
    assert max(used[6:]) <= 3  # of 4 tokens: 8 are seen, and the block under way
    assert group.sequences[0].output_token_ids == expected_output([3] * 80, 0, 60, windowed)
