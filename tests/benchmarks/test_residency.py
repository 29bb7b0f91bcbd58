from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings, strategies as st

TRACES = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("residency")


def most_hits(trace: list[int], budget: int, resident: frozenset[int] = frozenset()) -> int:
    """By trying everything."""
    if not trace:
        return 0
    first, rest = trace[0], trace[1:]
    if first in resident:
        return 1 + most_hits(rest, budget, resident)
    if len(resident) < budget:
        return most_hits(rest, budget, resident | {first})
    return max(most_hits(rest, budget, resident - {victim} | {first}) for victim in resident)


@settings(deadline=None, max_examples=60)
@given(trace=TRACES, budget=st.integers(1, 3))
def test_the_optimum_is_one(script: ModuleType, trace: list[int], budget: int) -> None:
    assert script.count_hits(trace, budget, script.Optimum(trace)) == most_hits(trace, budget)


def test_recency_and_frequency(script: ModuleType) -> None:
    trace = [1, 1, 1, 2, 3, 1]
    assert script.count_hits(trace, 2, script.LeastRecentlyUsed()) == 2
    assert script.count_hits(trace, 2, script.LeastFrequentlyUsed()) == 3
    assert script.count_hits(trace, 2, script.LeastFrequentlyUsed(), warm_up=3) == 1


def test_the_engines_policy_keeps_close_to_the_optimum(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a shorter trace of fewer variants than the benchmark's."""
    out = tmp_path / "results.json"
    size = ["--num-variants", "200", "--budget", "20", "--num-requests", "8000", "--warm-up", "2000"]
    assert script.main([*size, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == report["traces"]
    stationary, drifting = report["traces"]
    assert stationary["engine_of_optimum"] > 0.85
    assert drifting["engine_of_optimum"] > 0.75
    assert all(trace["lru"] < trace["engine"] < trace["optimum"] for trace in report["traces"])
