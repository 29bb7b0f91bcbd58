"""Which sequence holds which KV cache blocks, and which blocks can be shared. Pure Python; no torch.

A block is `block_size` consecutive token positions in the layers of one layer group: layers that see the same earlier
positions (most models have one group). A sequence has a block table for each group:

    position             0                                  first visible            num_computed  num_tokens
    table of a group     [ released: nobody needs them any more | held ......................................]
                           num_released blocks of the group       blocks [num_released, len(table))

A group that sees all positions gets blocks for all tokens at admission. One with limited sight gets no more than it
can ever hold at once; `extend` makes its table longer from chunk to chunk of a prompt, while earlier blocks are let go.

Blocks may be held by several sequences (a common prefix, or forks of one prompt) and are counted.

    referenced     ref_count > 0
    free           ref_count = 0, in `_free`, least recently released first; a free block that the prefix cache still
                   knows can be taken back by its name until it is handed out for other content

Host pool: the blocks of a swapped sequence are copied to host blocks, which are never shared, and let go.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableSequence, Sequence as SequenceOf
from dataclasses import dataclass

from model_worker.engine.prefix_cache import PrefixCache
from model_worker.engine.sequence import Sequence
from model_worker.engine.visibility import Visibility

BlockCopies = list[tuple[int, int]]
"""(source, destination) pairs."""


@dataclass(frozen=True, slots=True)
class PreemptionSize:
    """What bringing a sequence back would take, besides what others keep in the cache.

    Attributes:
        num_tokens: to be computed again after the loss of its blocks.
        num_blocks: copied, out and in together, when it is swapped.
    """

    num_tokens: int
    num_blocks: int


class BlockManager:
    """Allocates, shares, copies on write, swaps and releases KV cache blocks.

    Args:
        num_blocks: blocks in the cache, for all groups together.
        block_size: tokens in a block.
        enable_prefix_caching: keep full blocks findable by content.
        num_host_blocks: blocks in the host pool.
        groups: what the layers of each group see.
        max_step_tokens: most tokens of a sequence that are computed at once.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        num_host_blocks: int = 0,
        groups: SequenceOf[Visibility] = (Visibility(),),
        max_step_tokens: int = 512,
    ) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_host_blocks = num_host_blocks
        self.groups = tuple(groups)
        self.max_step_tokens = max_step_tokens
        self._limited = [(g, group) for g, group in enumerate(self.groups) if group.limited]
        self._ref_count = [0] * num_blocks
        self._prefix_cache = PrefixCache(num_blocks, block_size, self.groups)
        # An ordered set. Not a plain dict: finding its first key takes a walk over all that were deleted before it.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._free_host = list(range(num_host_blocks))

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_used_host_blocks(self) -> int:
        return self.num_host_blocks - len(self._free_host)

    def num_blocks_for(self, num_tokens: int) -> int:
        """The most that a sequence of so many tokens ever holds, in all groups together."""
        return sum(self._num_blocks_in(group, num_tokens) for group in self.groups)

    def longest_sequence(self, most: int) -> int:
        """The most tokens, up to `most`, of a sequence that has the cache for itself."""
        if self.num_blocks_for(most) <= self.num_blocks:
            return most
        return bisect_right(range(most), self.num_blocks, key=self.num_blocks_for) - 1

    # ------------------------------------------------------------------------------------------ taking blocks

    def admit(self, sequence: Sequence, *, reserve: int, use_prefix_cache: bool = True) -> bool:
        """Give a sequence that holds nothing blocks for its tokens, as many as possible from the prefix cache.

        On success `num_computed_tokens` counts the tokens found in the cache; at least one token is always left to
        compute, because its logits are wanted. Nothing changes when fewer than `reserve` blocks would stay free.
        """
        assert not any(sequence.block_tables)
        assert sequence.num_computed_tokens == 0
        num_shared = self._prefix_cache.find(sequence) if use_prefix_cache and self.enable_prefix_caching else 0
        names = sequence.block_hashes[:num_shared]
        num_released = self._num_invisible(num_shared * self.block_size)
        shared = [
            [block_of[name] for name in names[start:]]
            for block_of, start in zip(self._prefix_cache.block_of, num_released, strict=True)
        ]
        num_new = [
            self._num_blocks_in(group, sequence.num_tokens - start * self.block_size) - len(blocks)
            for group, start, blocks in zip(self.groups, num_released, shared, strict=True)
        ]
        num_revived = sum(1 for blocks in shared for block in blocks if self._ref_count[block] == 0)
        if len(self._free) - num_revived - sum(num_new) < reserve:
            return False
        for blocks in shared:
            for block in blocks:
                self._hold(block)
        sequence.block_tables = [
            _table([0] * start + blocks + [self._take_free() for _ in range(num)])
            for start, blocks, num in zip(num_released, shared, num_new, strict=True)
        ]
        sequence.num_released_blocks = num_released
        sequence.num_computed_tokens = num_shared * self.block_size
        sequence.num_entered_blocks = num_shared
        return True

    def extend(self, sequence: Sequence, end: int) -> bool:
        """Make all block tables of a prompt under way cover positions [0, end], as far as it has tokens.

        False, with nothing changed, when blocks are lacking. Needs none where every group sees everything.
        """
        num_blocks = -(-min(end + 1, sequence.num_tokens) // self.block_size)
        tables = [sequence.block_tables[g] for g, _ in self._limited]
        num_new = [max(0, num_blocks - len(table)) for table in tables]
        if sum(num_new) > len(self._free):
            return False
        for table, num in zip(tables, num_new, strict=True):
            table.extend(self._take_free() for _ in range(num))
        return True

    def grow(self, sequence: Sequence, *, num_drafts: int = 0, reserve: int = 0) -> BlockCopies | None:
        """Make the block tables of a decoding sequence cover tokens and drafts, and its next position writable.

        Blocks that were taken for drafts stay with the sequence when the drafts turn out wrong: its next tokens, or
        drafts, are written there.

        Returns the block copies to do before the next computation: those of the block that is written next when it is
        shared with a fork, else none. Returns None, with nothing changed, when fewer than `reserve` blocks would stay
        free.
        """
        table = sequence.block_tables[0]  # in the others the same blocks are missing, and shared
        num_new = max(0, -(-(len(sequence.token_ids) + num_drafts) // self.block_size) - len(table))
        first_written = sequence.num_computed_tokens // self.block_size
        copy = first_written < len(table) and self._ref_count[table[first_written]] > 1
        if num_new == 0 and not copy:
            return []
        if (num_new + copy) * len(self.groups) + reserve > len(self._free):
            return None
        copies = []
        for table in sequence.block_tables:
            if copy:
                source = table[first_written]
                self._ref_count[source] -= 1
                table[first_written] = self._take_free()
                copies.append((source, table[first_written]))
            table.extend(self._take_free() for _ in range(num_new))
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same tokens, share all blocks of `parent`."""
        assert not any(child.block_tables)
        child.block_tables = [table[:] for table in parent.block_tables]
        child.block_hashes = parent.block_hashes.copy()
        child.num_released_blocks = parent.num_released_blocks.copy()
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_entered_blocks = parent.num_entered_blocks
        for block in _held(child):
            self._ref_count[block] += 1

    # ------------------------------------------------------------------------------------------ giving them back

    def enter_computed(self, sequence: Sequence) -> None:
        """Account for what has been computed since the last call.

        Full blocks become findable by their content; blocks that no later position sees are let go.
        """
        num_full = sequence.num_computed_tokens // self.block_size
        if num_full <= sequence.num_entered_blocks:
            return
        if self.enable_prefix_caching:
            self._prefix_cache.enter(sequence, num_full)
        sequence.num_entered_blocks = num_full
        for g, group in self._limited:
            num_invisible = group.first_visible(sequence.num_computed_tokens) // self.block_size
            for i in range(sequence.num_released_blocks[g], num_invisible):
                self._let_go(sequence.block_tables[g][i])
                sequence.block_tables[g][i] = 0
                sequence.num_released_blocks[g] = i + 1

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence. Its last blocks are reused first: prefixes are worth more than tails."""
        self._release_device_blocks(sequence)
        self._free_host += (block for table in sequence.host_block_tables for block in table)
        sequence.host_block_tables = []
        sequence.num_released_blocks = [0] * len(self.groups)
        sequence.num_computed_tokens = 0

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of a sequence any more: what it computed cannot be trusted."""
        for block in _held(sequence):
            self._prefix_cache.forget(block)

    # ------------------------------------------------------------------------------------------ swapping

    def preemption_size(self, sequence: Sequence) -> PreemptionSize:
        """What it would take to bring a running sequence back once it has lost its blocks.

        Blocks that others hold too stay in the cache, where they are found again by their names; those that it holds
        alone would be free, and soon used.
        """
        num_computed = -(-sequence.num_computed_tokens // self.block_size)
        num_held = num_own = 0
        for table, start in zip(sequence.block_tables, sequence.num_released_blocks, strict=True):
            blocks = table[start:num_computed]
            num_held += len(blocks)
            num_own += len(blocks)
            if self.enable_prefix_caching:
                num_own -= sum(1 for block in blocks if self._ref_count[block] > 1)
        # Where a group has let blocks go, the prefix cache may lack them by then.
        num_found = 0 if any(sequence.num_released_blocks) else (num_held - num_own) // len(self.groups)
        num_tokens = max(1, sequence.num_computed_tokens - num_found * self.block_size)
        return PreemptionSize(num_tokens, num_held + num_own)

    def swap_out(self, sequence: Sequence) -> BlockCopies | None:
        """Move what a sequence has computed to the host pool; it then holds no block of the cache.

        Returns (block, host block) copies to do before anything else in the next step, or None, with nothing changed,
        when the host pool is too full.
        """
        num_computed = -(-sequence.num_computed_tokens // self.block_size)
        kept = [
            table[start:num_computed]
            for table, start in zip(sequence.block_tables, sequence.num_released_blocks, strict=True)
        ]
        if sum(map(len, kept)) > len(self._free_host):
            return None
        sequence.host_block_tables = [[self._free_host.pop() for _ in blocks] for blocks in kept]
        copies = _pairs(kept, sequence.host_block_tables)
        self._release_device_blocks(sequence)
        return copies

    def swap_in(self, sequence: Sequence, *, reserve: int) -> BlockCopies | None:
        """Give a swapped sequence its blocks again, as `admit` does. What the prefix cache still has is shared.

        Returns (host block, block) copies to do before anything else in the next step, or None, with nothing changed,
        when fewer than `reserve` blocks would stay free.
        """
        num_full = sequence.num_computed_tokens // self.block_size
        found: list[list[int | None]] = []
        for group, block_of, start in zip(
            self.groups, self._prefix_cache.block_of, sequence.num_released_blocks, strict=True
        ):
            names = sequence.block_hashes[start:num_full]  # none without a prefix cache
            blocks = [block_of.get(name) for name in names]
            num_tokens = sequence.num_tokens - start * self.block_size
            found.append(blocks + [None] * (self._num_blocks_in(group, num_tokens) - len(blocks)))
        num_new = sum(blocks.count(None) for blocks in found)
        num_revived = sum(1 for blocks in found for b in blocks if b is not None and self._ref_count[b] == 0)
        if len(self._free) - num_revived - num_new < reserve:
            return None
        for blocks in found:
            for block in blocks:
                if block is not None:
                    self._hold(block)
        copies: BlockCopies = []
        tables: list[MutableSequence[int]] = []
        for start, blocks, host_blocks in zip(
            sequence.num_released_blocks, found, sequence.host_block_tables, strict=True
        ):
            table = [self._take_free() if block is None else block for block in blocks]
            copies += [(host, table[i]) for i, host in enumerate(host_blocks) if blocks[i] is None]
            tables.append(_table([0] * start + table))
            self._free_host += host_blocks
        sequence.block_tables = tables
        sequence.host_block_tables = []
        return copies

    # ------------------------------------------------------------------------------------------ checks

    def check_integrity(self, running: Iterable[Sequence], swapped: Iterable[Sequence] = ()) -> None:
        """Recount every block from the sequences that hold blocks.

        Raises:
            AssertionError: counts, free lists and prefix cache do not agree: a leak or a double use.
        """
        expected = [0] * self.num_blocks
        for sequence in running:
            blocks = list(_held(sequence))
            assert len(set(blocks)) == len(blocks), f"block twice in {sequence}"
            assert not sequence.host_block_tables
            for block in blocks:
                expected[block] += 1
        assert expected == self._ref_count, "reference counts differ from the block tables"
        assert set(self._free) == {b for b, count in enumerate(expected) if count == 0}, "free list is wrong"
        self._prefix_cache.check_integrity()
        host_blocks = self._free_host.copy()
        for sequence in swapped:
            assert not any(sequence.block_tables), f"a swapped sequence holds blocks: {sequence}"
            host_blocks += (block for table in sequence.host_block_tables for block in table)
        assert sorted(host_blocks) == list(range(self.num_host_blocks)), "a host block leaked or is held twice"

    # ------------------------------------------------------------------------------------------ internal

    def _num_blocks_in(self, group: Visibility, num_tokens: int) -> int:
        return group.max_blocks(num_tokens, block_size=self.block_size, max_step_tokens=self.max_step_tokens)

    def _num_invisible(self, position: int) -> list[int]:
        """For each group, the leading blocks that neither `position` nor a later one sees."""
        return [group.first_visible(position) // self.block_size for group in self.groups]

    def _hold(self, block: int) -> None:
        self._free.pop(block, None)
        self._ref_count[block] += 1

    def _let_go(self, block: int) -> None:
        self._ref_count[block] -= 1
        assert self._ref_count[block] >= 0
        if self._ref_count[block] == 0:
            self._free[block] = None

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._prefix_cache.forget(block)
        self._ref_count[block] = 1
        return block

    def _release_device_blocks(self, sequence: Sequence) -> None:
        for block in reversed(list(_held(sequence))):
            self._let_go(block)
        sequence.block_tables = [_table(()) for _ in self.groups]
        sequence.num_entered_blocks = 0


def _table(blocks: Iterable[int]) -> array[int]:
    """An array, from which a step's table is copied a hundred times as fast as from a list."""
    return array("i", blocks)


def _held(sequence: Sequence) -> Iterator[int]:
    for table, start in zip(sequence.block_tables, sequence.num_released_blocks, strict=True):
        yield from table[start:]


def _pairs(sources: SequenceOf[SequenceOf[int]], destinations: SequenceOf[SequenceOf[int]]) -> BlockCopies:
    return [pair for a, b in zip(sources, destinations, strict=True) for pair in zip(a, b, strict=True)]
