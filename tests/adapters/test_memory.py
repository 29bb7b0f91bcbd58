"""Free memory under a container's limit."""

from __future__ import annotations

import psutil
import pytest

from adapters import memory


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_without_a_control_group(cgroup) -> None:
    assert 0 < memory.available_memory_bytes() <= psutil.virtual_memory().total


def test_within_a_limit(cgroup) -> None:
    (cgroup / "memory.max").write_text("5000000\n")
    (cgroup / "memory.current").write_text("3000000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert memory.available_memory_bytes() == 3_000_000
    (cgroup / "memory.current").write_text("9000000\n")
    assert memory.available_memory_bytes() == 0


def test_without_a_limit(cgroup) -> None:
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("3000000\n")
    (cgroup / "memory.stat").write_text("inactive_file 0\n")
    assert memory.available_memory_bytes() > 5_000_000


def test_where_the_kernel_does_not_say_what_is_available(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 1024 kB\n")
    assert memory.available_memory_bytes() > 1024 * 1024


def test_gib() -> None:
    assert memory.gib(3 << 29) == "1.50 GiB"
