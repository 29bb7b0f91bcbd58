"""Decode steps as captured graphs: one launch for the whole model, whatever the batch.

    batch of S sequences ──► the next larger bucket B ──► static inputs, filled up to B ──► replay ──► hidden [:S]

There are several graphs for each bucket: one for the base alone, and others that read whose rows are where from tables
that are filled before the replay, and so serve any mix of variants; they differ in the kinds of terms that they
compute, and the first that has all that the rows need is replayed. A graph reads only memory that stays where it is:
the inputs (`DeviceInputs`), what was drawn last, the variants' tables, weights and KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from model_worker.engine.layers.attention import ForwardContext
from model_worker.engine.lora.bound_variant import VariantSegments
from model_worker.engine.ops.paged_attention import AttentionMetadata
from model_worker.engine.step_batch import StepBatch
from model_worker.engine.step_inputs import BatchShape, DeviceInputs, StepTensors
from registry.progress import CountProgress

_BUCKET_STEP = 8


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

    def graph_terms(self, num_rows: int) -> Sequence[Any]:
        """GraphTerms for graphs of so many rows, from those that compute least to those that serve the most."""
        ...


class Capture(Protocol):
    """Turns a function that only launches work on static memory into something that launches it again."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs it at least once. -> the same work, as one launch"""
        ...


class CudaCapture:
    """Captures CUDA graphs, which share their memory: no two of them run at the same time.

    All are captured on one stream, because torch reuses the memory of a pool, and cuBLAS its workspace, only on the
    stream for which it was taken.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and makes workspaces, which a capture must not
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile, such as NCCL's that watches its calls, is their affair.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """Attributes:
    metadata: what attention keeps there is read by the graph.
    terms: of the variants; None: the graph is of the base alone.
    """

    shape: BatchShape
    replay: Callable[[], None]
    metadata: tuple[AttentionMetadata, ...]
    terms: GraphTerms | None


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then by 8, and max_num_seqs itself."""
    sizes = {1, 2, 4, *range(_BUCKET_STEP, max_num_seqs, _BUCKET_STEP)}
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
        self._hidden: Tensor | None = None  # [max_num_seqs, hidden]
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
        self._hidden = None

    def fits(self, batch: StepBatch, segments: VariantSegments) -> bool:
        """There is a graph for this batch: of one token of each sequence, from all of which is sampled."""
        if not batch.num_tokens == batch.num_sequences == len(batch.logit_rows):
            return False
        if batch.block_tables.shape[2] > self._max_blocks:
            return False
        return self._find(batch, segments) is not None

    def replay(self, batch: StepBatch, segments: VariantSegments) -> Tensor:
        """Compute a batch that fits. -> [T, hidden], until the next call"""
        graph = self._find(batch, segments)
        assert graph is not None
        self._inputs.fill(batch, graph.shape)
        if graph.terms is not None:
            graph.terms.fill(segments)
        graph.replay()
        assert self._hidden is not None
        return self._hidden[: batch.num_tokens]

    def _find(self, batch: StepBatch, segments: VariantSegments) -> _Graph | None:
        size = next((size for size in self._sizes if size >= batch.num_tokens), 0)
        if not segments:
            return self._graphs.get((size, 0))
        for kind in range(1, self._num_kinds):
            graph = self._graphs.get((size, kind))
            if graph is not None and graph.terms is not None and graph.terms.serves(segments):
                return graph
        return None

    def _captured(self, size: int, kind: int) -> _Graph:
        shape = BatchShape(self._num_groups, size, size, self._max_blocks, 0)
        tensors = self._inputs.tensors(shape)
        metadata = tuple(decode_metadata(tensors, group) for group in range(self._num_groups))
        terms: GraphTerms | None = None
        if kind > 0:
            terms = self._model.graph_terms(size)[kind - 1]
            terms.fill(())
        _clear(tensors)
        context = self._model.context

        def run() -> None:
            hidden = self._model(tensors.known_input_ids(self._drawn), tensors.positions)
            if self._hidden is None:  # in the first run, which is not captured
                self._hidden = hidden.new_empty((self._sizes[-1], hidden.shape[1]))
            self._hidden[:size].copy_(hidden)

        set_step(context, metadata, tensors)
        context.terms = cast(Any, terms)
        try:
            return _Graph(shape, self._capture(run), metadata, terms)
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
