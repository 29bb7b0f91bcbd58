from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model_worker.engine import machine
from model_worker.engine.config import EngineConfig
from model_worker.engine.machine import check_num_threads, choose_device, find_machine
from registry.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("name", "num_gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")],
)
def test_devices(name: str, num_gpus: int, device: str) -> None:
    assert choose_device(name, num_gpus=num_gpus) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "num_gpus", "message"),
    [
        ("gpu", 1, r"--device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("cuda:", 1, r"got 'cuda:'"),
        ("cuda:2", 2, r"torch sees 2 GPUs, cuda:0 to cuda:1"),
        ("cuda", 0, r"use --device cpu"),
    ],
)
def test_devices_that_are_not_there(name: str, num_gpus: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        choose_device(name, num_gpus=num_gpus)


def test_kernels_are_looked_for_only_where_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def find_kernels(cache_dir: Path, *, required: bool) -> None:
        asked.append(required)

    monkeypatch.setattr(machine, "find_kernels", find_kernels)
    assert not find_machine(EngineConfig(device="cpu"), tmp_path, quantization="auto").native_model_types
    find_machine(EngineConfig(device="cpu"), tmp_path, quantization="int8")
    assert asked == [False, True]
    divided = find_machine(EngineConfig(device="cpu", tensor_parallel_size=2), tmp_path, quantization="int8")
    assert "llama" in divided.native_model_types
    assert asked == [False, True]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_gpus_for_which_kernels_cannot_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    major, minor = capability
    properties = SimpleNamespace(name="A GPU", major=major, minor=minor, total_memory=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    if major >= 8:
        assert find_machine(EngineConfig(device="cuda"), tmp_path, quantization="auto").memory_bytes == 3
        return
    message = r"A GPU has compute capability 7\.5, the kernels for GPUs need 8\.0 or more .* or --device cpu"
    with pytest.raises(InvalidRequestError, match=message):
        find_machine(EngineConfig(), tmp_path, quantization="auto")


def test_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 4, 6})
    check_num_threads(None)
    check_num_threads(4)
    with pytest.raises(InvalidRequestError, match="--num-threads must be at most 4, the processors of this process"):
        check_num_threads(5)
