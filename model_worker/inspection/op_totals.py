"""The rows of a trace, added up by kind of operation and by layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from model_worker.engine.model_parts import OpKind
from model_worker.engine.trace import TraceRow
from model_worker.inspection.measured_step import StepTrace

K = TypeVar("K", bound=Hashable)

PRODUCTS_AND_ATTENTION = frozenset(
    {
        OpKind.QKV,
        OpKind.ATTENTION,
        OpKind.ATTENTION_OUTPUT,
        OpKind.ROUTER,
        OpKind.GATE_UP,
        OpKind.DOWN,
        OpKind.EXPERTS,
        OpKind.LINEAR,
        OpKind.HEAD,
    }
)
"""What a step cannot do without; the rest is overhead."""


@dataclass(frozen=True, slots=True)
class Total:
    """Sums over some rows.

    Attributes:
        share: of the time of all rows, 0 to 1.
    """

    num_ops: int
    self_ns: int
    share: float
    bytes_moved: int
    weight_bytes: int
    flops: int

    @property
    def gb_per_s(self) -> float:
        """Bytes moved a nanosecond: what the memory, or the caches, gave."""
        return self.bytes_moved / self.self_ns if self.self_ns else 0.0

    @property
    def gflops(self) -> float:
        """Floating-point operations a nanosecond."""
        return self.flops / self.self_ns if self.self_ns else 0.0


@dataclass(frozen=True, slots=True)
class KindTotal:
    kind: OpKind
    total: Total


@dataclass(frozen=True, slots=True)
class LayerTotal:
    """Attributes: layer: None: outside of all layers. self_ns_by_kind: where its time goes."""

    layer: int | None
    total: Total
    self_ns_by_kind: dict[OpKind, int]


def total_of(trace: StepTrace) -> Total:
    return _total(trace.rows, _time(trace.rows))


def overhead_share(trace: StepTrace) -> float:
    """Of the time: what is outside of matrix products and attention."""
    overhead_ns = _time(row for row in trace.rows if row.kind not in PRODUCTS_AND_ATTENTION)
    return overhead_ns / _time(trace.rows)


def totals_by_kind(trace: StepTrace) -> list[KindTotal]:
    """The longest first."""
    groups = _grouped(trace.rows, lambda row: row.kind)
    totals = [KindTotal(kind, _total(rows, _time(trace.rows))) for kind, rows in groups.items()]
    return sorted(totals, key=lambda total: -total.total.self_ns)


def totals_by_layer(trace: StepTrace) -> list[LayerTotal]:
    """Layers in order, then what is outside of them."""
    groups = _grouped(trace.rows, lambda row: row.layer)
    return [
        LayerTotal(
            layer,
            _total(groups[layer], _time(trace.rows)),
            {kind: _time(rows) for kind, rows in _grouped(groups[layer], lambda row: row.kind).items()},
        )
        for layer in sorted(groups, key=lambda layer: (layer is None, layer or 0))
    ]


def _grouped(rows: Iterable[TraceRow], key: Callable[[TraceRow], K]) -> dict[K, list[TraceRow]]:
    groups: dict[K, list[TraceRow]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _time(rows: Iterable[TraceRow]) -> int:
    return sum(row.self_ns for row in rows)


def _total(rows: Iterable[TraceRow], all_ns: int) -> Total:
    rows = list(rows)
    return Total(
        num_ops=len(rows),
        self_ns=_time(rows),
        share=_time(rows) / all_ns if all_ns else 0.0,
        bytes_moved=sum(row.bytes_moved for row in rows),
        weight_bytes=sum(row.weight_bytes for row in rows),
        flops=sum(row.flops for row in rows),
    )
