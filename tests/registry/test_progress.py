from __future__ import annotations

from registry.progress import ByteProgress, CountProgress


def test_a_line_at_each_tenth() -> None:
    lines: list[str] = []
    progress = ByteProgress("reading", lines.append)
    for done in range(0, 2_000_001, 10_000):
        progress(done, 2_000_000)
    progress(2_000_000, 2_000_000)
    assert lines == [f"reading: {percent} % of 2.0 MB" for percent in range(10, 101, 10)]


def test_nothing_to_do_is_all_done() -> None:
    lines: list[str] = []
    ByteProgress("reading", lines.append)(0, 0)
    assert lines == ["reading: 100 % of 0.0 MB"]


def test_counts_are_reported_at_each_tenth() -> None:
    lines: list[str] = []
    progress = CountProgress("graphs", lines.append)
    for done in range(1, 36):
        progress(done, 35)
    assert len(lines) == 10
    assert (lines[0], lines[-1]) == ("graphs: 4 of 35", "graphs: 35 of 35")
