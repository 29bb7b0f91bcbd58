"""Capturing CUDA graphs: what `DecodeGraphs` replays on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


class CudaCapture:
    """A `Capture` of CUDA graphs, which share their memory: no two of them run at the same time.

    All are captured on one stream, because torch reuses the memory of a pool, and cuBLAS its workspace, only on the
    stream for which it was taken. `torch.cuda.graph` would give back all memory that is not in use, on device and host,
    before each capture, to take it again: with many graphs that is most of the time.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        current, stream = torch.cuda.current_stream(), self._stream
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            run()  # compiles kernels, loads those of libraries and makes workspaces, which a capture must not
            stream.synchronize()
            with _no_garbage_collection():
                # What other threads ask of the device, such as NCCL's that watches its calls, is their affair.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # it tells of what has failed already
                        graph.capture_end()
                    raise
                graph.capture_end()
        current.wait_stream(stream)
        return graph.replay


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The end of tensors and graphs that nobody can reach any more would ask the device for what a capture forbids."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
