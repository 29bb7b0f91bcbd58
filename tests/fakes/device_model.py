"""A model that reads nothing of a step but tensors of the device, as a captured graph does, and a capture without CUDA.

    hidden of token t of sequence s, position p    sum over j <= p of (j + 1) * w[token j] + offset of its variant

The keys are the tokens' weights, kept in a paged cache. Rows of length 0 read nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.lora.bound_variant import BoundVariant, VariantHost, VariantSegments

HIDDEN = 3


@dataclass(frozen=True, slots=True)
class Offset:
    """A variant: what it adds to the hidden states.

    Attributes:
        in_graphs: graphs can compute it.
    """

    value: float
    in_graphs: bool = True
    num_bytes: int = 0
    num_extra_tokens: int = 0


class OffsetTerms:
    """See GraphTerms."""

    def __init__(self, num_rows: int) -> None:
        self.offsets = torch.zeros(num_rows)

    def serves(self, segments: VariantSegments) -> bool:
        return all(_offset(segment.variant).in_graphs for segment in segments)

    def fill(self, segments: VariantSegments) -> None:
        self.offsets.zero_()
        for start, end, variant in segments:
            self.offsets[start:end] = _offset(variant).value


class DeviceModel(VariantHost):
    """See the module's docstring; the head adds the variants' offsets once more.

    Attributes:
        num_calls: how often Python has run it; replays do that too, here.
        batch_sizes: tokens of each call.
    """

    def __init__(self, *, num_blocks: int, block_size: int, vocab_size: int = 50, num_groups: int = 1) -> None:
        self.context = ForwardContext()
        self.weights = torch.rand(vocab_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.head = torch.rand(vocab_size, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.caches = torch.full((num_groups, num_blocks * block_size), torch.nan, dtype=torch.float64)
        self.block_size = block_size
        self.batch_sizes: list[int] = []

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        self.batch_sizes.append(len(input_ids))
        hidden = torch.zeros(len(input_ids), HIDDEN, dtype=torch.float64)
        for group, cache in enumerate(self.caches):
            metadata, slots = self.context.of_group(group)
            kept = slots >= 0
            cache[slots[kept]] = self.weights[input_ids[kept]]
            assert metadata.device_seq_lens is not None
            for sequence, length in enumerate(metadata.device_seq_lens.tolist()):
                rows = slice(metadata.query_start[sequence], metadata.query_start[sequence + 1])
                blocks = metadata.block_tables[sequence, : -(-length // self.block_size)].long()
                slots_seen = (blocks[:, None] * self.block_size + torch.arange(self.block_size)).flatten()[:length]
                sums = (cache[slots_seen] * torch.arange(1, length + 1)).cumsum(0)
                if length:
                    hidden[rows, group % HIDDEN] += sums[positions[rows]]
        return hidden + self._offsets(len(hidden))[:, None]

    def logits(
        self, hidden: Tensor, variants: VariantSegments = (), *, graph_terms: OffsetTerms | None = None
    ) -> Tensor:
        offsets = _offsets(variants, len(hidden)) if graph_terms is None else graph_terms.offsets
        return (hidden + offsets[:, None]) @ self.head.T

    def graph_terms(self, num_rows: int) -> tuple[OffsetTerms, ...]:
        return (OffsetTerms(num_rows),)

    def _offsets(self, num_rows: int) -> Tensor:
        terms: object = self.context.terms
        if isinstance(terms, OffsetTerms):
            assert not self.context.variants
            return terms.offsets
        return _offsets(self.context.variants, num_rows)


class FakeCapture:
    """Runs a captured function again with the context that it was captured in, and so with its static tensors."""

    def __init__(self, context: ForwardContext) -> None:
        self._context = context
        self.num_captured = 0
        self.num_replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        self.num_captured += 1
        context = self._context
        captured = {name: getattr(context, name) for name in ForwardContext.__slots__}

        def replay() -> None:
            self.num_replays += 1
            assert context.metadata is None, "a step is under way"
            before = {name: getattr(context, name) for name in captured}
            for name, value in captured.items():
                setattr(context, name, value)
            try:
                run()
            finally:
                for name, value in before.items():
                    setattr(context, name, value)

        return replay


def _offsets(segments: VariantSegments, num_rows: int) -> Tensor:
    offsets = torch.zeros(num_rows)
    for start, end, variant in segments:
        offsets[start:end] = _offset(variant).value
    return offsets


def _offset(variant: BoundVariant) -> Offset:
    assert isinstance(variant, Offset)
    return variant
