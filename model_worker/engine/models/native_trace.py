"""The operations of a `NativeDecoder` as rows of a trace."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from model_worker.engine.model_parts import OpKind, place_of
from model_worker.engine.ops.cpu.program import Operation, Program, Step
from model_worker.engine.ops.embedding import Embedding
from model_worker.engine.ops.experts import CombineExperts, ExpertLinear, GatherRows, GroupByExpert, SelectExperts
from model_worker.engine.ops.linear import Linear, QuantizeRows
from model_worker.engine.ops.lora import AddEmbedding, Shrink
from model_worker.engine.ops.paged_attention.operation import PagedAttention
from model_worker.engine.ops.rms_norm import RMSNorm
from model_worker.engine.ops.rotary import RotaryKV
from model_worker.engine.trace import Shape, TraceRow

Runner = Callable[[Program, Step], None]

_LINEAR_KINDS = {
    "qkv": OpKind.QKV,
    "output": OpKind.ATTENTION_OUTPUT,
    "gate_up": OpKind.GATE_UP,
    "down": OpKind.DOWN,
    "head": OpKind.HEAD,
    "router": OpKind.ROUTER,
}


def run_plainly(program: Program, step: Step) -> None:
    program.run(step)


class TracedRun:
    """Runs programs and takes note of every operation.

    Attributes:
        rows: in the order of the operations.
    """

    def __init__(self) -> None:
        self.rows: list[TraceRow] = []

    def __call__(self, program: Program, step: Step) -> None:
        begin = time.perf_counter_ns()
        durations = np.rint(program.time(step) * 1e9).astype(int).tolist()
        for operation, duration in zip(program.operations, durations, strict=True):
            self.rows.append(_row(operation, step, begin, duration))
            begin += duration


def _row(operation: Operation, step: Step, begin_ns: int, self_ns: int) -> TraceRow:
    place = place_of(operation.name)
    inputs, outputs = _shapes(operation, step.num_rows)
    weight = operation.weight if isinstance(operation, Linear | ExpertLinear) else None
    weight_bytes = 0 if weight is None else weight.num_bytes
    if isinstance(operation, ExpertLinear):
        weight_bytes = operation.read_bytes(step)
    return TraceRow(
        layer=place.layer,
        name=place.name,
        kind=_kind(operation),
        inputs=inputs,
        outputs=outputs,
        dtype="float32" if weight is None else weight.format.name.lower(),
        begin_ns=begin_ns,
        self_ns=self_ns,
        bytes_moved=operation.bytes_moved(step),
        weight_bytes=weight_bytes,
        flops=operation.flops(step),
    )


def _kind(operation: Operation) -> OpKind:
    if isinstance(operation, Linear):
        return _LINEAR_KINDS[operation.name.rpartition(".")[2]]
    if isinstance(operation, QuantizeRows):
        return OpKind.QUANTIZE
    if isinstance(operation, Shrink | AddEmbedding):
        return OpKind.LORA
    if isinstance(operation, SelectExperts | GroupByExpert):
        return OpKind.ROUTER
    if isinstance(operation, ExpertLinear | GatherRows | CombineExperts):
        return OpKind.EXPERTS
    if isinstance(operation, Embedding):
        return OpKind.EMBEDDING
    if isinstance(operation, RMSNorm):
        return OpKind.NORM
    if isinstance(operation, PagedAttention):
        return OpKind.ATTENTION
    return OpKind.ROTARY


def _shapes(operation: Operation, num_rows: int) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    def rows(width: int) -> Shape:
        return (num_rows, width)

    if isinstance(operation, Linear | RMSNorm):
        return (rows(operation.x.shape[1]),), (rows(operation.out.shape[1]),)
    if isinstance(operation, ExpertLinear | GatherRows | CombineExperts):
        pairs = num_rows * operation.plan.num_chosen
        if isinstance(operation, ExpertLinear):
            return ((pairs, operation.x.shape[1]),), ((pairs, operation.out.shape[1]),)
        if isinstance(operation, GatherRows):
            return (rows(operation.x.shape[1]),), ((pairs, operation.out.shape[1]),)
        return ((pairs, operation.y.shape[1]),), (rows(operation.out.shape[1]),)
    if isinstance(operation, Shrink):
        return (rows(operation.x.shape[1]),), ()
    if isinstance(operation, SelectExperts):
        return (rows(operation.plan.num_experts),), (rows(operation.plan.num_chosen),)
    if isinstance(operation, GroupByExpert):
        return (rows(operation.plan.num_chosen),), (rows(operation.plan.num_chosen),)
    if isinstance(operation, QuantizeRows):
        return (rows(operation.x.shape[1]),), (rows(operation.out.values.shape[1]), rows(operation.out.scales.shape[1]))
    if isinstance(operation, Embedding | AddEmbedding):
        return ((num_rows,),), (rows(operation.out.shape[1]),)
    if isinstance(operation, PagedAttention):
        return (rows(operation.query.shape[1]),), (rows(operation.out.shape[1]),)
    if isinstance(operation, RotaryKV):
        widths = (operation.query.shape[1], operation.key.shape[1], operation.value.shape[1])
        return tuple(rows(width) for width in widths), (rows(widths[0]),)
    return ((num_rows,),), ()
