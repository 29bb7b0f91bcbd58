"""Which tokens of a flat batch belong to which sequence, and where the keys and values of each sequence lie."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from model_worker.engine.visibility import Visibility


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """The batch of one step, shared by all layers.

        sequence s            tokens [query_start[s], query_start[s + 1]) of the batch
        their positions       [seq_lens[s] - query length, seq_lens[s])
        position j            slot j % block_size of block block_tables[s, j // block_size]

    A *decode step* has one token of each sequence. On a GPU its kernels take from the host only how many sequences
    there are and how wide the block tables are, and read all else on the device, so that a captured graph of them can
    be replayed with other contents of `block_tables` and `device_seq_lens`. While a graph can be replayed its metadata
    must live: its plans hold workspace. Of other steps the host's numbers are looked at, and they are not captured.

    Attributes:
        block_tables: [S, max_blocks] int32; entries past the end of a sequence are not looked at.
        query_start: S + 1 ascending numbers, on the host so that nothing waits for a device.
        seq_lens: S numbers; tokens of the sequence up to and with those of this batch.
        positions: [T] int64, position of each token in its sequence.
        device_seq_lens: [S] int32 on the device, read in place of `seq_lens` in decode steps on GPUs; 0: a row that
            only fills the batch up, for which nothing is read and zeros are written. None: made from `seq_lens`.
        plans: what an implementation derived from the above for this step, kept because all layers need the same.
    """

    block_tables: Tensor
    query_start: tuple[int, ...]
    seq_lens: tuple[int, ...]
    positions: Tensor
    device_seq_lens: Tensor | None = None
    plans: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether the batch has one token of each sequence; none has less."""
        return self.query_start[-1] == len(self.seq_lens)

    @property
    def num_sequences(self) -> int:
        return len(self.seq_lens)

    def query_len(self, sequence: int) -> int:
        return self.query_start[sequence + 1] - self.query_start[sequence]


@dataclass(frozen=True, slots=True, eq=False)
class Alibi:
    """Linear biases: `multiplier * slopes[h] * j` is added to the scores of head h for the key at position j.

    Adding the same to all keys of a row changes nothing, so this equals the bias -slope * distance. The product is
    rounded to the dtype of `slopes` first: models differ in it. Source: Press et al., arXiv 2108.12409.

    Attributes:
        slopes: [H]
    """

    slopes: Tensor
    multiplier: float = 1.0

    def bias(self, positions: Tensor) -> Tensor:
        """positions [L] int64 -> [H, L] float32"""
        return (self.slopes[:, None] * positions).float() * self.multiplier


@dataclass(frozen=True, slots=True, eq=False)
class AttentionParams:
    """What is fixed for a layer.

    Attributes:
        scale: of the products of query and key.
        sliding_window: a token sees this many positions, its own included; None: all.
        chunk_size: a token sees only positions of its own chunk, [n * chunk_size, (n + 1) * chunk_size); None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: off. Source: Gemma 2, arXiv 2408.00118, section 2.
        sinks: [H] one more score a head, which takes part in the softmax but has no value; None: none.
            Source: gpt-oss model card, arXiv 2508.10925, section 2.2.
        alibi: position biases, or None.
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi: Alibi | None = None

    @property
    def visibility(self) -> Visibility:
        return Visibility(self.sliding_window, self.chunk_size)

    def first_visible(self, position: int) -> int:
        """The first key position that the token at `position` sees."""
        return self.visibility.first_visible(position)
