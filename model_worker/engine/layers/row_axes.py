"""Where modules have the tokens of a batch: found out by running the model on two batches of different lengths.

A module can be computed for each token by itself, and so with other weights for some tokens, if it is called with one
tensor that has an axis of the batch's length, and what it returns has such an axis too. An expert of a mixture that is
a module of its own sees only the tokens that chose it, and is none of these.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RowAxes:
    """Of a module that computes each token by itself.

    Attributes:
        input: axis of its first argument.
        outputs: axis of each tensor that it returns.
        rows_lead: all axes of the input before the last are together as long as the batch.
        dtype: of the input.
    """

    input: int
    outputs: tuple[int, ...]
    rows_lead: bool
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Call:
    inputs: tuple[torch.Size, ...]
    outputs: tuple[torch.Size, ...]
    dtype: torch.dtype


class RowAxisProbe:
    """Notes the shapes of all calls while it watches."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[nn.Module, list[_Call]]] = {}  # by the length of the batch

    @contextmanager
    def watching(self, model: nn.Module, num_tokens: int) -> Iterator[None]:
        """The model is run on a batch of this length."""
        calls: dict[nn.Module, list[_Call]] = defaultdict(list)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = list(tensors((*args, *kwargs.values())))
            if args and isinstance(args[0], Tensor):
                calls[module].append(_Call(_shapes(inputs), _shapes(tensors((output,))), args[0].dtype))

        owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
        handles = [module.register_forward_hook(note, with_kwargs=True) for module in owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._calls[num_tokens] = calls

    def axes(self) -> dict[nn.Module, RowAxes]:
        """Of the modules that compute each token by itself; the model was run on two batches."""
        (short, of_short), (long, of_long) = sorted(self._calls.items())
        found = {}
        for module, calls in of_short.items():
            pairs = list(zip(calls, of_long.get(module, ()), strict=False))
            axes = {_axes(first, second, short, long) for first, second in pairs}
            if len(calls) == len(of_long.get(module, ())) and len(axes) == 1 and (only := axes.pop()) is not None:
                found[module] = only
        return found


def _axes(first: _Call, second: _Call, short: int, long: int) -> RowAxes | None:
    if len(first.inputs) != 1 or len(second.inputs) != 1 or not first.outputs:
        return None
    if len(first.outputs) != len(second.outputs):
        return None
    before, after = (*first.inputs, *first.outputs), (*second.inputs, *second.outputs)
    axes = [_axis(a, b, short, long) for a, b in zip(before, after, strict=True)]
    known = [axis for axis in axes if axis is not None]
    if len(known) != len(axes):
        return None
    rows_lead = math.prod(first.inputs[0][:-1]) == short and known[0] < len(first.inputs[0]) - 1
    return RowAxes(known[0], tuple(known[1:]), rows_lead, first.dtype)


def _axis(first: torch.Size, second: torch.Size, short: int, long: int) -> int | None:
    """The one axis that has grown along with the batch."""
    if len(first) != len(second):
        return None
    grown = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 and (first[grown[0]], second[grown[0]]) == (short, long) else None


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the values, and in tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def _shapes(found: Iterable[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in found)
