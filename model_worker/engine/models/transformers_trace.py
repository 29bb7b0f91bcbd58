"""The operations of a `TransformersModel`, seen through hooks around its modules and its attention."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.engine.layers.attention import ForwardContext, PagedAttention
from model_worker.engine.layers.linear import Linear
from model_worker.engine.model_parts import OpKind, linear_kind, place_of
from model_worker.engine.models.attention_interface import ATTRIBUTE, Attention
from model_worker.engine.ops.paged_attention import AttentionMetadata, AttentionParams
from model_worker.engine.trace import Shape, TraceRow

_ACTIVATION = re.compile(r"Activation|Tanh|[GS]elu|[GSR]e?LU", re.IGNORECASE)
_NO_OPS = (nn.Dropout, nn.Identity, nn.ModuleList)  # nothing is computed


@contextmanager
def trace_modules(causal_lm: nn.Module, context: ForwardContext, device: torch.device) -> Iterator[list[TraceRow]]:
    """See `Traceable.trace`.

    Args:
        causal_lm: transformers' module.
        context: of its attention.
        device: where it computes; on one that computes asynchronously, each operation is waited for.
    """
    tracer = _Tracer(device)
    handles = []
    attentions: list[tuple[nn.Module, Attention]] = []
    try:
        for path, module in causal_lm.named_modules():
            if isinstance(module, _NO_OPS):
                continue
            operation = _ModuleOperation(path, module)
            handles.append(module.register_forward_pre_hook(lambda *_: tracer.enter()))
            handles.append(module.register_forward_hook(_leave(tracer, operation), with_kwargs=True))
            attention = getattr(module, ATTRIBUTE, None)
            if isinstance(attention, PagedAttention):
                attentions.append((module, attention))
                setattr(module, ATTRIBUTE, _TracedAttention(f"{path}.paged_attention", attention, context, tracer))
        yield tracer.rows
    finally:
        for handle in handles:
            handle.remove()
        for module, attention in attentions:
            setattr(module, ATTRIBUTE, attention)


@dataclass(slots=True)
class _Frame:
    """An operation under way. Time that tracing itself takes is between `entered` and `begin`, and after its end."""

    entered: int
    begin: int
    inside_ns: int = 0  # of the operations that it called, with the time to trace them


class _Tracer:
    """Times nested operations and collects their rows."""

    def __init__(self, device: torch.device) -> None:
        self.rows: list[TraceRow] = []
        self._stack: list[_Frame] = []
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def enter(self) -> None:
        entered = time.perf_counter_ns()
        self._synchronize()
        frame = _Frame(entered, entered)
        self._stack.append(frame)
        frame.begin = time.perf_counter_ns()

    def leave(self, make_row: Callable[[int, int], TraceRow]) -> None:
        """`make_row` gets the operation's begin and own time, in nanoseconds."""
        self._synchronize()
        end = time.perf_counter_ns()
        frame = self._stack.pop()
        self.rows.append(make_row(frame.begin, end - frame.begin - frame.inside_ns))
        if self._stack:
            self._stack[-1].inside_ns += time.perf_counter_ns() - frame.entered


class _ModuleOperation:
    """What is known of a module before it is called."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._place = place_of(path)
        self._module = module
        self._kind = _module_kind(path, module)
        self._weights = _weights(module)

    def row(self, inputs: list[Tensor], outputs: list[Tensor], begin_ns: int, self_ns: int) -> TraceRow:
        weight_bytes, flops = self._weights_read(inputs, outputs)
        dtype = (self._weights or outputs or inputs)[0].dtype
        moves = self._kind is not OpKind.BETWEEN  # what such a module does itself cannot be seen from outside
        return TraceRow(
            layer=self._place.layer,
            name=self._place.name,
            kind=self._kind,
            inputs=_shapes(inputs),
            outputs=_shapes(outputs),
            dtype=str(dtype).removeprefix("torch."),
            begin_ns=begin_ns,
            self_ns=self_ns,
            bytes_moved=weight_bytes + (_num_bytes(inputs) + _num_bytes(outputs) if moves else 0),
            weight_bytes=weight_bytes,
            flops=flops,
        )

    def _weights_read(self, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[int, int]:
        """Bytes of weights that were read, and floating-point operations of products with them."""
        all_bytes = _num_bytes(self._weights)
        if isinstance(self._module, Linear):
            rows = inputs[0].numel() // self._module.in_features
            return all_bytes, 2 * rows * self._module.in_features * self._module.out_features
        if self._kind is OpKind.EMBEDDING:
            return _num_bytes(outputs), 0  # the rows that were looked up
        matrices = [weight for weight in self._weights if weight.ndim >= 2]
        if self._kind is OpKind.EXPERTS and matrices:
            num_experts = matrices[0].shape[0]
            values = sum(weight.numel() for weight in matrices) // num_experts  # of one expert
            choices = [tensor for tensor in inputs if not tensor.is_floating_point()]
            if choices:
                return all_bytes * len(torch.unique(choices[0])) // num_experts, 2 * choices[0].numel() * values
            return all_bytes, 2 * (inputs[0].numel() // inputs[0].shape[-1]) * values
        if self._kind is OpKind.ROUTER:
            values = sum(weight.numel() for weight in matrices)
            return all_bytes, 2 * (inputs[0].numel() // inputs[0].shape[-1]) * values
        return all_bytes, 0


class _TracedAttention:
    """Stands in for the attention of one layer."""

    def __init__(self, path: str, attention: PagedAttention, context: ForwardContext, tracer: _Tracer) -> None:
        self._place = place_of(path)
        self._attention = attention
        self._context = context
        self._tracer = tracer

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *rotation: Any) -> Tensor:
        self._tracer.enter()
        out: Tensor = self._attention(query, key, value, *rotation)
        self._tracer.leave(lambda begin_ns, self_ns: self._row([query, key, value], out, begin_ns, self_ns))
        return out

    def _row(self, inputs: list[Tensor], out: Tensor, begin_ns: int, self_ns: int) -> TraceRow:
        metadata = self._context.metadata
        assert metadata is not None
        num_read, num_pairs = visible_keys(metadata, self._attention.params)
        query, key, value = inputs
        token_bytes = self._attention.kv_shape.num_elements * key.element_size()
        return TraceRow(
            layer=self._place.layer,
            name=self._place.name,
            kind=OpKind.ATTENTION,
            inputs=_shapes(inputs),
            outputs=_shapes([out]),
            dtype=str(query.dtype).removeprefix("torch."),
            begin_ns=begin_ns,
            self_ns=self_ns,
            bytes_moved=_num_bytes([*inputs, out]) + (num_read + len(key)) * token_bytes,
            flops=2 * num_pairs * query.shape[1] * (query.shape[2] + value.shape[2]),
        )


def visible_keys(metadata: AttentionMetadata, params: AttentionParams) -> tuple[int, int]:
    """Keys that the step has to read in one layer, each once a sequence; and pairs of a query and a key it sees."""
    num_read = num_pairs = 0
    for sequence, seq_len in enumerate(metadata.seq_lens):
        first_query = seq_len - metadata.query_len(sequence)
        num_read += seq_len - params.first_visible(first_query)
        num_pairs += sum(position - params.first_visible(position) + 1 for position in range(first_query, seq_len))
    return num_read, num_pairs


def _leave(tracer: _Tracer, operation: _ModuleOperation) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tracer.leave(
            lambda begin_ns, self_ns: operation.row(
                list(_tensors((*args, *kwargs.values()))), list(_tensors((output,))), begin_ns, self_ns
            )
        )

    return hook


def _module_kind(path: str, module: nn.Module) -> OpKind:
    cls = type(module).__name__
    if isinstance(module, Linear):
        return linear_kind(path)
    if isinstance(module, nn.Embedding):
        return OpKind.EMBEDDING
    if "Rotary" in cls:
        return OpKind.ROTARY
    if "Norm" in cls:
        return OpKind.NORM
    if cls.endswith("Experts"):
        return OpKind.EXPERTS
    if "Router" in cls:
        return OpKind.ROUTER
    is_leaf = next(module.children(), None) is None
    return OpKind.ACTIVATION if is_leaf and _ACTIVATION.search(cls) else OpKind.BETWEEN


def _weights(module: nn.Module) -> list[Tensor]:
    """The module's own weights, in whatever form they are kept."""
    own: list[Tensor] = [*module.parameters(recurse=False)]
    if isinstance(module, Linear):
        own += [value for value in vars(module.method).values() if isinstance(value, Tensor)]
    return own


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):  # transformers' ModelOutput is one
            yield from _tensors(value.values())


def _shapes(tensors: list[Tensor]) -> tuple[Shape, ...]:
    return tuple(_without_batch(tensor) for tensor in tensors)


def _without_batch(tensor: Tensor) -> Shape:
    """Inside the decoder, activations are [1, T, ...] and token ids and positions [1, T]."""
    shape = tuple(tensor.shape)
    is_batch = len(shape) > 2 or (len(shape) == 2 and not tensor.is_floating_point())
    return shape[1:] if is_batch and shape[0] == 1 else shape


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
