"""Which blocks hold content that is known by its name. Pure Python; no torch.

A full block is named by the chain  h_i = SHA-256(h_{i-1} || tokens of block i),  h_{-1} = SHA-256(digests of base and
variant), so equal names mean equal tokens *and* equal weights all the way from the start. Reloading other weights under
an old name can therefore never serve stale blocks. A prefix is found when each layer group has those of its blocks that
the next position can see. Source of the idea: vLLM's automatic prefix caching.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from struct import Struct

from model_worker.engine.sequence import Sequence
from model_worker.engine.visibility import Visibility


class PrefixCache:
    """Names of blocks, held or free. A sequence keeps the names of its leading full blocks, made as they are needed.

    Args:
        num_blocks: in the cache, for all groups together.
        block_size: tokens in a block.
        groups: what the layers of each group see.

    Attributes:
        block_of: for each group, the blocks that are known, by name; for readers.
    """

    def __init__(self, num_blocks: int, block_size: int, groups: SequenceOf[Visibility]) -> None:
        self.block_of: list[dict[bytes, int]] = [{} for _ in groups]
        self._name_of: list[tuple[int, bytes] | None] = [None] * num_blocks  # group and name
        self._block_size = block_size
        self._limited = [(g, group) for g, group in enumerate(groups) if group.limited]
        self._unlimited = [g for g, group in enumerate(groups) if not group.limited]
        self._pack = Struct(f"{block_size}i").pack

    def find(self, sequence: Sequence) -> int:
        """The most leading blocks after which the sequence can go on with what is known."""
        best = 0
        run = dict.fromkeys((g for g, _ in self._limited), 0)  # blocks found without a gap, up to this one
        for i in range((sequence.num_tokens - 1) // self._block_size):
            self._extend_names(sequence, i + 1)  # no further than blocks are found
            name = sequence.block_hashes[i]
            for g in self._unlimited:
                if name not in self.block_of[g]:
                    return best
            enough = True
            for g, group in self._limited:
                run[g] = run[g] + 1 if name in self.block_of[g] else 0
                first_seen = group.first_visible((i + 1) * self._block_size) // self._block_size
                enough = enough and run[g] > i - first_seen
            if enough:
                best = i + 1
        return best

    def enter(self, sequence: Sequence, num_full: int) -> None:
        """Make those of the first `num_full` blocks known that have become full since the last call."""
        self._extend_names(sequence, num_full)
        for g, table in enumerate(sequence.block_tables):
            block_of = self.block_of[g]
            for i in range(max(sequence.num_entered_blocks, sequence.num_released_blocks[g]), num_full):
                name = sequence.block_hashes[i]
                if name not in block_of:  # else another block with the same content is known already
                    block_of[name] = table[i]
                    self._name_of[table[i]] = (g, name)

    def forget(self, block: int) -> None:
        """It will hold other content, or nobody may find what it holds."""
        known = self._name_of[block]
        if known is not None:
            g, name = known
            del self.block_of[g][name]
            self._name_of[block] = None

    def check_integrity(self) -> None:
        """Raises AssertionError: blocks and names do not agree."""
        for g, block_of in enumerate(self.block_of):
            for name, block in block_of.items():
                assert self._name_of[block] == (g, name), "prefix cache names a block that holds other content"
        assert sum(name is not None for name in self._name_of) == sum(map(len, self.block_of))

    def _extend_names(self, sequence: Sequence, num_blocks: int) -> None:
        names = sequence.block_hashes
        while len(names) < num_blocks:
            start = len(names) * self._block_size
            parent = names[-1] if names else hashlib.sha256(sequence.weights_digest.encode()).digest()
            token_ids = sequence.token_ids[start : start + self._block_size]
            names.append(hashlib.sha256(parent + self._pack(*token_ids)).digest())
