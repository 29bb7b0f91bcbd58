"""A CUDA device without a card: the code for GPUs runs as it is, over tensors that have shapes, types and strides.

Tensors of the device are on torch's meta device, and say that they are on cuda:0. They have no numbers, so that a model
of any size can be built: copies to the host are zeros, and where the host reads some numbers, which makes it wait for
the device, that is counted. Launches of Triton's kernels have to be recorded (`launch_recorder.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GIB = 2**30
_META = torch.device("meta")
_READS: Mapping[str, Any] = {
    "allclose": True,
    "__bool__": True,
    "__int__": 1,
    "__float__": 1.0,
    "item": 1,
    "tolist": None,
}


class FakeCuda:
    """A GPU that nobody else uses: an H200, or one with another compute capability.

    Attributes:
        device: what its tensors say.
        capturing: a graph is being captured: whatever waits for the device, or compiles a kernel, would spoil it.
        num_replays: of all graphs.
        num_reads: how often the host has read numbers, for which it has to wait; single ones are 1, comparisons hold,
            others are 0.
    """

    device = torch.device("cuda", 0)
    total_bytes = 140 * _GIB

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.capturing = False
        self.num_replays = 0
        self.num_reads = 0

    @contextmanager
    def installed(self) -> Iterator[FakeCuda]:
        """For this thread."""
        with pytest.MonkeyPatch.context() as patch, _OnMeta(self):
            for name, value in self._functions().items():
                patch.setattr(torch.cuda, name, value)
            patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
            yield self

    def _functions(self) -> Mapping[str, object]:
        """What the engine calls of torch.cuda."""
        properties = SimpleNamespace(
            name="no GPU",
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=132,
            total_memory=self.total_bytes,
        )
        cuda = self

        class Event:
            def record(self, stream: object = None) -> None: ...

            def wait(self, stream: object = None) -> None: ...

            def query(self) -> bool:
                return True

            def synchronize(self) -> None:
                cuda.waits()

        class Stream:
            def __init__(self, device: object = None) -> None: ...

            def wait_stream(self, stream: object) -> None: ...

            def record_event(self, event: object = None) -> Event:
                return Event()

            def synchronize(self) -> None:
                cuda.waits()

        class CUDAGraph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                assert not cuda.capturing
                cuda.capturing = True

            def capture_end(self) -> None:
                cuda.capturing = False

            def replay(self) -> None:
                cuda.num_replays += 1

        current = Stream()
        return {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda device=None: current,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "synchronize": lambda device=None: cuda.waits(),
            "empty_cache": lambda: None,
            "get_device_properties": lambda device: properties,
            "get_device_capability": lambda device=None: cuda.capability,
            "get_device_name": lambda device=None: properties.name,
            "mem_get_info": lambda device: (cuda.total_bytes, cuda.total_bytes),
            "memory_reserved": lambda device: 0,
            "max_memory_reserved": lambda device: _GIB,
            "reset_peak_memory_stats": lambda device: None,
        }

    def waits(self) -> None:
        """Somebody waits for the device."""
        assert not self.capturing, "the capture of a graph waits for the device"


class _OnMeta(TorchFunctionMode):
    """Takes what is meant for CUDA to the meta device."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is torch.device:
            return function(*args, **kwargs)
        if name == "__get__":
            return _attribute(function, args)
        if name == "pin_memory":
            return args[0]
        if name in _READS and args[0].device.type == "meta":
            self._cuda.waits()
            self._cuda.num_reads += 1
            return torch.zeros(args[0].shape).tolist() if name == "tolist" else _READS[name]
        kwargs = {key: _moved(value) for key, value in kwargs.items() if key != "pin_memory"}
        args = tuple(_moved(value) for value in args)
        if name == "copy_" and args[0].device.type == "cpu" and args[1].device.type == "meta":
            return args[0].zero_()
        if name in ("cpu", "to") and args[0].device.type == "meta":
            target = "cpu" if name == "cpu" else kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(target, torch.device | str) and torch.device(target).type == "cpu":
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return function(*args, **kwargs)


def _attribute(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    value = function(*args)
    of = getattr(function, "__self__", None)
    if of is Tensor.device and value.type == "meta":
        return FakeCuda.device
    if of is Tensor.is_cuda:
        return Tensor.device.__get__(args[0]).type == "meta"
    return value


def _moved(value: Any) -> Any:
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return _META if is_cuda or (isinstance(value, str) and value.startswith("cuda")) else value
