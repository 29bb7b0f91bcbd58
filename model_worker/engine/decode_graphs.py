"""Decode steps as captured graphs: one launch for the whole model with its head, whatever the batch.

    batch of S sequences ──► the next larger bucket B ──► static inputs, filled up to B ──► replay ──► logits [:S]

There are several graphs for each bucket: one for the base alone, and others that read whose rows are where from tables
that are filled before the replay, and so serve any mix of variants; they differ in the kinds of terms that they
compute, and the first that has all that the rows need is replayed. A graph reads only memory that stays where it is:
the inputs (`DeviceInputs`), block tables, what was drawn last, the variants' tables, weights and KV cache. Block tables
are as wide as the longest sequence that may come; of them only the columns in use are sent to the device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.lora.bound_variant import VariantSegments
from model_worker.engine.ops.paged_attention import AttentionMetadata
from model_worker.engine.step_batch import StepBatch
from model_worker.engine.step_inputs import BatchShape, DeviceInputs, StepTensors
from registry.progress import CountProgress

_STEPS = ((32, 8), (64, 16))  # up to so many rows buckets are so many apart
_LARGE_STEP = 32


class GraphTerms(Protocol):
    """What stands for the variants of the rows while a graph is captured, in memory that the graph reads."""

    def serves(self, segments: VariantSegments) -> bool:
        """Whether a replay computes these rows."""
        ...

    def fill(self, segments: VariantSegments) -> None:
        """The next replays compute these rows; their variants have to be held until they are done."""
        ...


@runtime_checkable
class GraphedModel(Protocol):
    """A model of which decode steps can be captured: it launches the same work for any batch of one size.

    For rows with variants `context.terms` is set while it is captured.
    """

    context: ForwardContext

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """See CausalModel."""
        ...

    def logits(self, hidden: Tensor, *, graph_terms: Any = None) -> Tensor:
        """See CausalModel; of the rows of a graph that is captured with these `GraphTerms`."""
        ...

    def graph_terms(self, num_rows: int) -> Sequence[Any]:
        """GraphTerms for graphs of so many rows, from those that compute least to those that serve the most."""
        ...


class Capture(Protocol):
    """Turns a function that only launches work on static memory into something that launches it again."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs it at least once. -> the same work, as one launch"""
        ...


class Replayed(NamedTuple):
    """What a replay gives, until the next one.

    Attributes:
        hidden: [T, hidden] in the model's dtype.
        logits: [T, vocab] float32.
    """

    hidden: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Attributes:
    num_rows: of the bucket.
    block_tables: [G, num_rows, max_blocks] int32
    metadata: what attention keeps there is read by the graph.
    terms: of the variants; None: the graph is of the base alone.
    """

    num_rows: int
    replay: Callable[[], None]
    block_tables: Tensor
    metadata: tuple[AttentionMetadata, ...]
    terms: GraphTerms | None


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, then by 32, and max_num_seqs itself.

    Rows that fill a bucket up cost next to nothing as long as a step's time is that of reading the weights, up to a
    hundred rows and more; each size costs four graphs.
    """
    sizes = {1, 2, 4}
    first = 0
    for last, step in (*_STEPS, (max_num_seqs, _LARGE_STEP)):
        sizes |= {*range(first + step, last + 1, step)}
        first = last
    return tuple(sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs}))


class DecodeGraphs:
    """The graphs of one model.

    Args:
        model: whose KV cache stays where it is from now on.
        inputs: has room for the largest bucket.
        drawn: [at least max_num_seqs] int64, what the step before drew.
        num_groups: layer groups.
        max_blocks: width of the block tables.
        capture: `CudaCapture`.
    """

    def __init__(
        self,
        model: GraphedModel,
        inputs: DeviceInputs,
        drawn: Tensor,
        *,
        max_num_seqs: int,
        num_groups: int,
        max_blocks: int,
        capture: Capture,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._drawn = drawn
        self._sizes = bucket_sizes(max_num_seqs)
        self._num_groups = num_groups
        self._max_blocks = max_blocks
        self._capture = capture
        self._outputs: Replayed | None = None  # of max_num_seqs rows
        self._block_tables = torch.zeros(num_groups * max_num_seqs * max_blocks, dtype=torch.int32, device=drawn.device)
        self._graphs: dict[tuple[int, int], _Graph] = {}  # by size and kind: 0, the base's, or 1 + that of the terms
        self._num_kinds = 1 + len(model.graph_terms(1))

    @property
    def num_graphs(self) -> int:
        """How many there are when all are captured."""
        return self._num_kinds * len(self._sizes)

    def capture(self, progress: CountProgress | None = None, *, most: int | None = None) -> None:
        """Capture the graphs that are not there yet, the largest first: the others fit into its memory.

        Args:
            most: so many buckets of each kind only.
        """
        for size in reversed(self._sizes[-most:] if most else self._sizes):
            for kind in range(self._num_kinds):
                if (size, kind) not in self._graphs:
                    self._graphs[size, kind] = self._captured(size, kind)
                if progress is not None:
                    progress(len(self._graphs), self.num_graphs)

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self._graphs.clear()
        self._outputs = None

    def replay(self, batch: StepBatch, segments: VariantSegments) -> Replayed | None:
        """Compute a batch of one token of each sequence, all sampled from. None: there is no graph for it."""
        if not batch.num_tokens == batch.num_sequences == len(batch.logit_rows):
            return None
        if batch.block_tables.shape[2] > self._max_blocks:
            return None
        graph = self._find(batch.num_tokens, segments)
        if graph is None:
            return None
        tables = self._inputs.load(batch, num_rows=graph.num_rows).block_tables
        graph.block_tables[:, :, : tables.shape[2]].copy_(tables)
        if graph.terms is not None:
            graph.terms.fill(segments)
        graph.replay()
        assert self._outputs is not None
        return Replayed(*(output[: batch.num_tokens] for output in self._outputs))

    def _find(self, num_rows: int, segments: VariantSegments) -> _Graph | None:
        place = bisect_left(self._sizes, num_rows)
        if place == len(self._sizes):
            return None
        size = self._sizes[place]
        if not segments:
            return self._graphs.get((size, 0))
        for kind in range(1, self._num_kinds):
            graph = self._graphs.get((size, kind))
            if graph is not None and graph.terms is not None and graph.terms.serves(segments):
                return graph
        return None

    def _captured(self, size: int, kind: int) -> _Graph:
        num_groups = self._num_groups
        block_tables = self._block_tables[: num_groups * size * self._max_blocks].view(num_groups, size, -1)
        shape = BatchShape(num_groups, size, size, 0, 0)
        tensors = self._inputs.tensors(shape)._replace(block_tables=block_tables)
        metadata = tuple(decode_metadata(tensors, group) for group in range(num_groups))
        terms: GraphTerms | None = None
        if kind > 0:
            terms = self._model.graph_terms(size)[kind - 1]
            terms.fill(())
        _clear(tensors)
        context = self._model.context

        def run() -> None:
            hidden = self._model(tensors.known_input_ids(self._drawn), tensors.positions)
            logits = self._model.logits(hidden, graph_terms=terms)
            outputs = self._outputs
            if outputs is None:  # in the first run, which is not captured
                num_rows = self._sizes[-1]
                of_logits = logits.new_empty((num_rows, logits.shape[1]), dtype=torch.float32)
                self._outputs = outputs = Replayed(hidden.new_empty((num_rows, hidden.shape[1])), of_logits)
            outputs.hidden[:size].copy_(hidden)
            outputs.logits[:size].copy_(logits)

        set_step(context, metadata, tensors)
        context.terms = cast(Any, terms)
        try:
            return _Graph(size, self._capture(run), block_tables, metadata, terms)
        finally:
            context.metadata = context.slot_mapping = context.terms = None
            context.further_groups = ()


def _clear(tensors: StepTensors) -> None:
    """Make them rows of nobody: what is left there of steps of other shapes may be out of all bounds."""
    assert tensors.seq_lens is not None
    assert tensors.sources is not None
    for tensor in (tensors.input_ids, tensors.positions, tensors.seq_lens):
        tensor.zero_()
    for tensor in (tensors.slot_mapping, tensors.sources):
        tensor.fill_(-1)


def decode_metadata(tensors: StepTensors, group: int) -> AttentionMetadata:
    """Of rows with one token each, whose lengths only the device knows."""
    num_rows = len(tensors.input_ids)
    return AttentionMetadata(
        block_tables=tensors.block_tables[group],
        query_start=tuple(range(num_rows + 1)),
        seq_lens=(1,) * num_rows,
        positions=tensors.positions,
        device_seq_lens=tensors.seq_lens,
    )


def set_step(context: ForwardContext, metadata: Sequence[AttentionMetadata], tensors: StepTensors) -> None:
    context.metadata, context.slot_mapping = metadata[0], tensors.slot_mapping[0]
    context.further_groups = tuple(zip(metadata[1:], tensors.slot_mapping[1:], strict=True))
