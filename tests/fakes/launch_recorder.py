"""What of Triton's kernels is launched, and for what each launch would have to be compiled. Nothing is computed.

A kernel is compiled anew for other constants, other types of arguments, and for what Triton's binder finds of the
values: integers that are 1 or divisible by 16, addresses that are divisible by 16, None. That is asked of the binder of
the version that is installed, so it is the truth for that version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TARGET = ("cuda", 90, 32)  # what is found of arguments is the same for all of NVIDIA's


@dataclass(frozen=True)
class CompiledFor:
    """What one kernel is compiled for.

    Attributes:
        arguments: (name, type, constant or what is known of the value) of each, in the order of the signature.
        options: of the launch.
    """

    module: str
    name: str
    arguments: tuple[tuple[str, str, str], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        listed = ", ".join(f"{name}: {kind} {known}".rstrip() for name, kind, known in self.arguments)
        return f"{self.name}[{', '.join(f'{key}={value}' for key, value in self.options)}]({listed})"


@dataclass(slots=True)
class Launches:
    """Of one such form of a kernel.

    Attributes:
        constants: by the place of the argument.
        divisible: places of arguments that are divisible by 16.
        types: of all arguments.
        grid: the most programs in each direction.
    """

    constants: dict[int, Any]
    divisible: tuple[int, ...]
    types: tuple[str, ...]
    grid: tuple[int, int, int]
    count: int = 0


class LaunchRecorder:
    """Attributes:
    found: all launches until now.
    """

    def __init__(self, is_capturing: Callable[[], bool] = lambda: False) -> None:
        self.found: dict[CompiledFor, Launches] = {}
        self._is_capturing = is_capturing

    @contextmanager
    def installed(self) -> Iterator[LaunchRecorder]:
        """In place of launching, and of interpreting."""
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        recorder = self

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            recorder._note(kernel, args, grid, kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", run)
            patch.setattr(InterpretedFunction, "run", run)
            yield self

    def _note(self, kernel: Any, args: tuple[Any, ...], grid: tuple[int, ...], kwargs: Mapping[str, Any]) -> None:
        bind = _binder(kernel)
        bound, found, options = bind(*map(_on_device, args), **{key: _on_device(each) for key, each in kwargs.items()})
        assert set(options) <= set(_OPTIONS), options
        names = tuple(bound)
        types = tuple(kind for kind, _ in found)
        constants = {place: bound[names[place]] for place, kind in enumerate(types) if kind == "constexpr"}
        known = [str(constants.get(place, each or "")) for place, (_, each) in enumerate(found)]
        arguments = tuple(zip(names, types, known, strict=True))
        key = CompiledFor(kernel.fn.__module__, kernel.fn.__name__, arguments, tuple(options.items()))
        whole = (*grid, 1, 1)[:3]
        launches = self.found.get(key)
        if launches is None:
            assert not self._is_capturing(), f"compiled while a graph is captured: {key}"
            divisible = tuple(place for place, (kind, each) in enumerate(found) if kind != "constexpr" and each == "D")
            launches = self.found[key] = Launches(constants, divisible, types, whole)
        first, second, third = launches.grid
        launches.grid = max(first, whole[0]), max(second, whole[1]), max(third, whole[2])
        launches.count += 1


@dataclass(frozen=True, slots=True)
class _Address:
    """Of a tensor of the device, from the beginning of its memory, which CUDA's allocator aligns to 512 bytes."""

    dtype: torch.dtype
    offset_bytes: int

    def data_ptr(self) -> int:
        return self.offset_bytes


def _on_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    assert value.is_cuda, "a kernel gets memory of the host"
    return _Address(value.dtype, value.storage_offset() * value.element_size() if value.numel() else 0)


@cache
def _binder(kernel: Any) -> Callable[..., tuple[dict[str, Any], list[tuple[str, Any]], dict[str, Any]]]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if isinstance(kernel, InterpretedFunction):  # defined where TRITON_INTERPRET was set
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    bind: Callable[..., Any] = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget(*_TARGET))
    )
    return bind
