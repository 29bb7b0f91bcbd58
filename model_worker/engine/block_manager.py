"""Which sequence holds which KV cache blocks, and which blocks can be shared. Pure Python; no torch.

A block is `block_size` consecutive token positions in every layer. Sequences hold blocks through their block tables;
a block may be held by several (a common prefix, or forks of one prompt) and is counted.

    referenced     ref_count > 0
    free           ref_count = 0, in `_free`, least recently released first; a free block that the prefix cache still
                   knows can be taken back by its hash until it is handed out for other content

Prefix cache: a full block is named by the chain  h_i = SHA-256(h_{i-1} || tokens of block i),  h_{-1} = SHA-256(variant
digest), so equal names mean equal tokens *and* equal weights all the way from the start. Reloading other weights under
an old name can therefore never serve stale blocks. Source of the idea: vLLM's automatic prefix caching.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from struct import Struct

from model_worker.engine.sequence import Sequence


class BlockManager:
    """Allocates, shares, copies on write and releases KV cache blocks.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
        enable_prefix_caching: keep full blocks findable by content.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pack = Struct(f"{block_size}i").pack
        self._ref_count = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # An ordered set. Not a plain dict: finding its first key takes a walk over all that were deleted before it.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # ------------------------------------------------------------------------------------------ taking blocks

    def admit(self, sequence: Sequence, *, reserve: int, use_prefix_cache: bool = True) -> bool:
        """Give a sequence that holds nothing blocks for all its tokens, as many as possible from the prefix cache.

        On success `num_computed_tokens` counts the tokens found in the cache; at least one token is always left to
        compute, because its logits are wanted. Nothing changes when fewer than `reserve` blocks would stay free.
        """
        assert not sequence.block_table
        assert sequence.num_computed_tokens == 0
        shared = self._find_prefix(sequence) if use_prefix_cache and self.enable_prefix_caching else []
        num_new = self.num_blocks_for(sequence.num_tokens) - len(shared)
        num_revived = sum(1 for block in shared if self._ref_count[block] == 0)
        if len(self._free) - num_revived - num_new < reserve:
            return False
        for block in shared:
            self._free.pop(block, None)
            self._ref_count[block] += 1
        sequence.block_table = shared + [self._take_free() for _ in range(num_new)]
        sequence.num_computed_tokens = len(shared) * self.block_size
        sequence.num_entered_blocks = len(shared)
        return True

    def grow(self, sequence: Sequence) -> list[tuple[int, int]] | None:
        """Make the block table cover all tokens of a sequence, and its next position writable.

        Returns the (source, destination) block copies to do before the next computation: one when the block that is
        written next is shared with a fork, else none. Returns None, with nothing changed, when blocks are lacking.
        """
        table = sequence.block_table
        num_new = -(-len(sequence.token_ids) // self.block_size) - len(table)
        first_written = sequence.num_computed_tokens // self.block_size
        copy = first_written < len(table) and self._ref_count[table[first_written]] > 1
        if num_new == 0 and not copy:
            return []
        if num_new + copy > len(self._free):
            return None
        copies = []
        if copy:
            source = table[first_written]
            self._ref_count[source] -= 1
            table[first_written] = self._take_free()
            copies.append((source, table[first_written]))
        table.extend(self._take_free() for _ in range(num_new))
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same tokens, share all blocks of `parent`."""
        assert not child.block_table
        child.block_table = list(parent.block_table)
        child.block_hashes = list(parent.block_hashes)
        child.num_computed_tokens = parent.num_computed_tokens
        child.num_entered_blocks = parent.num_entered_blocks
        for block in child.block_table:
            self._ref_count[block] += 1

    # ------------------------------------------------------------------------------------------ giving them back

    def enter_computed(self, sequence: Sequence) -> None:
        """Make the full blocks that have been computed since the last call findable by their content."""
        num_full = sequence.num_computed_tokens // self.block_size
        if num_full <= sequence.num_entered_blocks or not self.enable_prefix_caching:
            return
        self._extend_hashes(sequence, num_full)
        for i in range(sequence.num_entered_blocks, num_full):
            block, name = sequence.block_table[i], sequence.block_hashes[i]
            if name not in self._block_of:  # else another block with the same content is known already
                self._block_of[name] = block
                self._hash_of[block] = name
        sequence.num_entered_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence. Its last blocks are reused first: prefixes are worth more than tails."""
        for block in reversed(sequence.block_table):
            self._ref_count[block] -= 1
            assert self._ref_count[block] >= 0
            if self._ref_count[block] == 0:
                self._free[block] = None
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_entered_blocks = 0

    def forget(self, sequence: Sequence) -> None:
        """Let nobody find the blocks of a sequence any more: what it computed cannot be trusted."""
        for block in sequence.block_table:
            self._forget_name(block)

    # ------------------------------------------------------------------------------------------ checks

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Recount every block from the sequences that hold blocks.

        Raises:
            AssertionError: counts, free list and prefix cache do not agree: a leak or a double use.
        """
        expected = [0] * self.num_blocks
        for sequence in holders:
            assert len(set(sequence.block_table)) == len(sequence.block_table), f"block twice in {sequence}"
            for block in sequence.block_table:
                expected[block] += 1
        assert expected == self._ref_count, "reference counts differ from the block tables"
        assert set(self._free) == {b for b, count in enumerate(expected) if count == 0}, "free list is wrong"
        for name, block in self._block_of.items():
            assert self._hash_of[block] == name, "prefix cache names a block that holds other content"
        assert sum(name is not None for name in self._hash_of) == len(self._block_of)

    # ------------------------------------------------------------------------------------------ internal

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._forget_name(block)
        self._ref_count[block] = 1
        return block

    def _forget_name(self, block: int) -> None:
        name = self._hash_of[block]
        if name is not None:
            del self._block_of[name]
            self._hash_of[block] = None

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        found: list[int] = []
        for i in range((sequence.num_tokens - 1) // self.block_size):
            self._extend_hashes(sequence, i + 1)  # no further than blocks are found
            block = self._block_of.get(sequence.block_hashes[i])
            if block is None:
                break
            found.append(block)
        return found

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes = sequence.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else hashlib.sha256(sequence.variant_digest.encode()).digest()
            token_ids = sequence.token_ids[start : start + self.block_size]
            hashes.append(hashlib.sha256(parent + self._pack(*token_ids)).digest())
