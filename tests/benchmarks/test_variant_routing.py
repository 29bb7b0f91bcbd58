from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("variant_routing")


def test_variant_routing_finds_more_variants_ready_and_spreads_the_hot_ones(script: ModuleType) -> None:
    scenario = script.Scenario(num_requests=3000)
    variant, least = (script.simulate(scenario, routing) for routing in ("variant", "least load"))
    assert variant.ready > least.ready + 0.1
    assert variant.on_disk < least.on_disk
    assert variant.mean_s < least.mean_s
    assert variant.busiest_over_mean < 1.2
    hot = script.simulate(script.Scenario(num_requests=3000, zipf=1.5), "variant")
    assert hot.workers_of_hottest > 1
    assert hot.busiest_over_mean < 1.2


def test_it_is_deterministic_and_writes_what_is_committed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []
    for name in ("a.json", "b.json"):
        monkeypatch.setattr(sys, "argv", ["x", "--num-requests", "200", "--json", str(tmp_path / name)])
        script.main()
        written.append((tmp_path / name).read_text())
    assert written[0] == written[1]
    committed = json.loads((ROOT / "benchmarks/results/2026-11-21-variant-routing.json").read_text())
    report = json.loads(written[0])
    assert [part["results"][0].keys() for part in report] == [part["results"][0].keys() for part in committed]
    assert "variant" in capsys.readouterr().out
