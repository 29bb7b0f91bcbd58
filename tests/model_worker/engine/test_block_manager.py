from __future__ import annotations

from hypothesis import given, settings, strategies as st

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.sequence import Sequence
from model_worker.engine.visibility import Visibility

BLOCK_SIZE = 4


def make_sequence(seq_id: int, token_ids: list[int], base_digest: str = "") -> Sequence:
    return Sequence(seq_id, 0, token_ids, SamplingParams(), seed=0, base_digest=base_digest)


def compute_all(manager: BlockManager, sequence: Sequence) -> None:
    sequence.num_computed_tokens = sequence.num_tokens
    manager.enter_computed(sequence)


def test_admission_takes_exactly_the_blocks_of_all_tokens() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    sequence = make_sequence(0, list(range(9)))
    assert manager.admit(sequence, reserve=0)
    assert len(sequence.block_table) == 3
    assert manager.num_used_blocks == 3
    manager.release(sequence)
    assert manager.num_used_blocks == 0
    manager.check_integrity([])


def test_admission_that_would_break_into_the_reserve_changes_nothing() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    sequence = make_sequence(0, list(range(9)))
    assert not manager.admit(sequence, reserve=2)
    assert manager.num_used_blocks == 0
    assert not sequence.block_table
    assert manager.admit(sequence, reserve=1)


def test_equal_prefix_is_shared_while_held_and_after_release() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first = make_sequence(0, list(range(10)))
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    second = make_sequence(1, [*range(8), 90, 91])
    manager.admit(second, reserve=0)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.num_computed_tokens == 8
    manager.check_integrity([first, second])
    manager.release(first)
    manager.release(second)
    third = make_sequence(2, list(range(10)))
    manager.admit(third, reserve=0)
    assert third.num_computed_tokens == 8
    manager.check_integrity([third])


def test_at_least_one_token_is_left_to_compute() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first = make_sequence(0, list(range(8)))
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    again = make_sequence(1, list(range(8)))
    manager.admit(again, reserve=0)
    assert again.num_computed_tokens == 4


def test_other_weights_never_share_blocks() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    base = make_sequence(0, list(range(10)), "sha256:a")
    manager.admit(base, reserve=0)
    compute_all(manager, base)
    variant = make_sequence(1, list(range(10)), "sha256:b")
    manager.admit(variant, reserve=0)
    assert variant.num_computed_tokens == 0
    assert not set(base.block_table) & set(variant.block_table)


def test_equal_block_after_different_prefix_is_not_shared() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    first = make_sequence(0, [1, 1, 1, 1, 5, 6, 7, 8, 9])
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    second = make_sequence(1, [2, 2, 2, 2, 5, 6, 7, 8, 9])
    manager.admit(second, reserve=0)
    assert second.num_computed_tokens == 0


def test_switched_off_nothing_is_shared() -> None:
    manager = BlockManager(8, BLOCK_SIZE, enable_prefix_caching=False)
    first = make_sequence(0, list(range(10)))
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    second = make_sequence(1, list(range(10)))
    manager.admit(second, reserve=0)
    assert second.num_computed_tokens == 0


def test_cached_blocks_are_reused_for_other_content_least_recent_first() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    old, new = make_sequence(0, list(range(8))), make_sequence(1, list(range(100, 108)))
    for sequence in (old, new):
        manager.admit(sequence, reserve=0)
        compute_all(manager, sequence)
        manager.release(sequence)
    other = make_sequence(2, list(range(200, 208)))
    manager.admit(other, reserve=0)
    probe_old, probe_new = make_sequence(3, [*range(8), 0]), make_sequence(4, [*range(100, 108), 0])
    manager.release(other)
    assert manager.admit(probe_new, reserve=0)
    assert probe_new.num_computed_tokens == 8
    manager.release(probe_new)
    assert manager.admit(probe_old, reserve=0)
    assert probe_old.num_computed_tokens == 0


def test_a_fork_copies_the_block_that_it_writes_and_no_other() -> None:
    manager = BlockManager(8, BLOCK_SIZE)
    parent = make_sequence(0, list(range(6)))
    manager.admit(parent, reserve=0)
    compute_all(manager, parent)
    child = make_sequence(1, list(range(6)))
    manager.fork(parent, child)
    shared_tail = parent.block_table[1]
    child.append(50)
    assert manager.grow(child) == [(shared_tail, child.block_table[1])]
    assert child.block_table[0] == parent.block_table[0]
    assert child.block_table[1] != shared_tail
    parent.append(60)
    assert manager.grow(parent) == []
    manager.check_integrity([parent, child])


def test_growth_without_free_blocks_changes_nothing() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    sequence = make_sequence(0, list(range(8)))
    manager.admit(sequence, reserve=0)
    compute_all(manager, sequence)
    sequence.append(1)
    table = list(sequence.block_table)
    assert manager.grow(sequence) is None
    assert list(sequence.block_table) == table
    manager.check_integrity([sequence])


def test_a_window_needs_only_its_own_blocks_of_a_prefix() -> None:
    """Blocks that no later position sees may be gone: the prefix is found all the same."""
    manager = BlockManager(6, BLOCK_SIZE, groups=(Visibility(sliding_window=6),))
    first = make_sequence(0, list(range(20)))
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    assert first.num_released_blocks == [3]  # position 20 sees 15 and later
    manager.release(first)
    other = make_sequence(1, list(range(100, 108)))
    assert manager.admit(other, reserve=0)  # takes the two that were let go first
    again = make_sequence(2, list(range(21)))
    assert manager.admit(again, reserve=0)
    assert again.num_computed_tokens == 20
    assert again.num_released_blocks == [3]
    manager.check_integrity([other, again])


def test_a_prefix_is_as_long_as_all_groups_have_it() -> None:
    groups = (Visibility(), Visibility(sliding_window=6))
    manager = BlockManager(40, BLOCK_SIZE, groups=groups)
    first = make_sequence(0, list(range(21)))
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    assert first.num_released_blocks == [0, 4]
    manager.release(first)
    assert manager.num_blocks_for(21) == 12
    shorter = make_sequence(1, [*range(9), 77, 78])  # what the window let go still lies there
    assert manager.admit(shorter, reserve=0)
    assert shorter.num_computed_tokens == 8
    manager.check_integrity([shorter])


def test_a_swapped_sequence_gets_its_blocks_again_and_shares_what_is_still_there() -> None:
    manager = BlockManager(8, BLOCK_SIZE, num_host_blocks=3)
    first = make_sequence(0, list(range(10)))
    manager.admit(first, reserve=0)
    compute_all(manager, first)
    second = make_sequence(1, [*range(8), 50])
    manager.admit(second, reserve=0)
    held = list(first.block_table)
    size = manager.preemption_size(first)
    assert (size.num_tokens, size.num_blocks) == (2, 4)  # two full blocks stay with the second one
    copies = manager.swap_out(first)
    assert copies is not None
    assert [block for block, _ in copies] == held
    manager.check_integrity([second], [first])
    assert manager.num_used_host_blocks == 3
    back = manager.swap_in(first, reserve=0)
    assert back is not None
    assert first.block_table[:2] == second.block_table[:2]
    assert back == [(copies[2][1], first.block_table[2])]
    assert first.num_computed_tokens == 10
    manager.check_integrity([first, second])


def test_swapping_without_room_changes_nothing() -> None:
    manager = BlockManager(6, BLOCK_SIZE, num_host_blocks=3)
    large, small = make_sequence(0, list(range(14))), make_sequence(1, [90])
    manager.admit(large, reserve=0)
    compute_all(manager, large)
    assert manager.swap_out(large) is None
    assert len(large.block_table) == 4
    manager.admit(small, reserve=0)
    compute_all(manager, small)
    assert manager.swap_out(small) is not None
    assert manager.swap_in(small, reserve=2) is None
    manager.check_integrity([large], [small])
    manager.release(small)
    manager.check_integrity([large])


GROUPS = st.sampled_from(
    [
        (Visibility(),),
        (Visibility(sliding_window=5),),
        (Visibility(), Visibility(chunk_size=6)),
    ]
)
OPERATIONS = ["admit", "grow", "fork", "release", "swap_out", "swap_in"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 99)), max_size=60), GROUPS, st.booleans())
def test_no_block_leaks_or_is_held_twice_after_any_mix(
    operations: list[tuple[str, int]], groups: tuple[Visibility, ...], caching: bool
) -> None:
    """A model check: what each sequence wrote in each position that it still sees is there when it is read."""
    num_blocks = 12 * len(groups)
    manager = BlockManager(
        num_blocks,
        BLOCK_SIZE,
        num_host_blocks=10,
        groups=groups,
        max_step_tokens=32,
        enable_prefix_caching=caching,
    )
    live: list[Sequence] = []
    swapped: list[Sequence] = []
    memory: dict[tuple[int, int], int] = {}  # (block, offset) -> token written there
    host: dict[tuple[int, int], int] = {}

    def copy(
        source: dict[tuple[int, int], int], target: dict[tuple[int, int], int], pairs: list[tuple[int, int]]
    ) -> None:
        read = {(b, offset): source.get((a, offset), -1) for a, b in pairs for offset in range(BLOCK_SIZE)}
        target.update(read)

    def compute(sequence: Sequence) -> None:
        for position in range(sequence.num_computed_tokens, sequence.num_tokens):
            for table in sequence.block_tables:
                memory[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = sequence.token_ids[position]
        compute_all(manager, sequence)

    for number, (operation, value) in enumerate(operations):
        if operation == "admit":
            sequence = make_sequence(number, [value % 2] * (1 + value % 20))
            if manager.admit(sequence, reserve=0):
                compute(sequence)
                live.append(sequence)
        elif operation == "swap_in":
            if swapped:
                sequence = swapped[value % len(swapped)]
                copies = manager.swap_in(sequence, reserve=0)
                if copies is not None:
                    copy(host, memory, copies)
                    swapped.remove(sequence)
                    live.append(sequence)
        elif live:
            sequence = live[value % len(live)]
            if operation == "release":
                manager.release(sequence)
                live.remove(sequence)
            elif operation == "fork":
                child = make_sequence(number, sequence.token_ids)
                manager.fork(sequence, child)
                live.append(child)
            elif operation == "swap_out":
                copies = manager.swap_out(sequence)
                if copies is not None:
                    copy(memory, host, copies)
                    live.remove(sequence)
                    swapped.append(sequence)
            else:
                sequence.append(value)
                copies = manager.grow(sequence)
                if copies is None:
                    sequence.token_ids.pop()
                else:
                    copy(memory, memory, copies)
                    compute(sequence)
        manager.check_integrity(live, swapped)
        for sequence in live:
            for table, group in zip(sequence.block_tables, groups, strict=True):
                for position in range(group.first_visible(sequence.num_tokens), sequence.num_tokens):
                    token = sequence.token_ids[position]
                    assert memory[table[position // BLOCK_SIZE], position % BLOCK_SIZE] == token
    for sequence in live + swapped:
        manager.release(sequence)
    assert manager.num_used_blocks == 0
    assert manager.num_used_host_blocks == 0
    manager.check_integrity([])
