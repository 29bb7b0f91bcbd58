"""Graphs are captured after a run that is not, on one stream, and with nothing collected meanwhile; without CUDA."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from model_worker.engine.cuda_capture import CudaCapture


class FakeCuda:
    """What is asked of torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.calls = list[str]()

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                pass

            def synchronize(self) -> None:
                calls.append("synchronize")

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                calls.append(f"begin {pool} {capture_error_mode}")

            def capture_end(self) -> None:
                calls.append("end")
                if "out of memory" in calls:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self) -> None:
                calls.append("replay")

        current = Stream()

        @contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            assert stream is not current
            calls.append("on stream")
            yield
            calls.append("off stream")

        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
        monkeypatch.setattr(torch.cuda, "stream", on_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)


def test_the_first_run_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = FakeCuda(monkeypatch).calls
    replay = CudaCapture()(lambda: calls.append(f"run, collecting: {gc.isenabled()}"))
    assert gc.isenabled()
    replay()
    assert calls == [
        "on stream",
        "run, collecting: True",
        "synchronize",
        "begin pool thread_local",
        "run, collecting: False",
        "end",
        "off stream",
        "replay",
    ]


def test_what_has_failed_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = FakeCuda(monkeypatch).calls

    def run() -> None:
        if "begin pool thread_local" in calls:
            calls.append("out of memory")
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaCapture()(run)
    assert calls[-1] == "end"
    assert gc.isenabled()
