from __future__ import annotations

from hypothesis import given, strategies as st

from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.sequence_queue import SequenceQueue


@given(st.lists(st.integers(0, 9), max_size=40))
def test_it_is_a_sorted_set(numbers: list[int]) -> None:
    """Each number adds its sequence, or takes it out again."""
    sequences = [Sequence(seq_id, 0, [1], SamplingParams(), seed=0) for seq_id in range(10)]
    queue, model = SequenceQueue(), set[int]()
    for number in numbers:
        if number in model:
            queue.remove(sequences[number])
            model.remove(number)
        else:
            queue.add(sequences[number])
            model.add(number)
        assert [sequence.seq_id for sequence in queue] == sorted(model)
        assert len(queue) == len(model)
        if model:
            assert (queue.first.seq_id, queue.last.seq_id) == (min(model), max(model))


def test_a_snapshot_stays_as_it_was() -> None:
    queue = SequenceQueue()
    sequence = Sequence(0, 0, [1], SamplingParams(), seed=0)
    queue.add(sequence)
    snapshot = queue.snapshot()
    queue.remove(sequence)
    assert snapshot == [sequence]
    assert not queue
