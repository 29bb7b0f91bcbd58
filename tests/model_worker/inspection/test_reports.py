"""The three forms of an inspection: all of them say everything, JSON keeps its shape, HTML needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.inspection.html_report import format_html
from model_worker.inspection.inspection import Inspection, InspectRequest, inspect_model
from model_worker.inspection.json_report import format_json
from model_worker.inspection.text_report import format_text
from registry.errors import InvalidRequestError
from tests.fakes.tiny_models import build_tiny_model, make_tiny_plan

CONFIG = EngineConfig(CacheConfig(block_size=8, num_blocks=32), SchedulerConfig(max_num_batched_tokens=64))


def inspect(path: Path, model: str = "llama", max_num_seqs: int = 64, **request: Any) -> Inspection:
    torch.set_num_threads(1)
    if not (path / "config.json").exists():
        build_tiny_model(model).save_pretrained(path)
    values = {"rows": (1, 2), "contexts": (8, 20), "memory_bytes": 10**6, **request}
    config = replace(CONFIG, scheduler=replace(CONFIG.scheduler, max_num_seqs=max_num_seqs))
    return inspect_model(make_tiny_plan(path), config, InspectRequest(**values), name="tiny <llama>")


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    return inspect(tmp_path_factory.mktemp("llama"))


def _keys(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all leaves; elements of lists are alike."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _keys(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _keys(item, f"{path}[]")
    else:
        yield path.removeprefix(".")


TOTAL = ("num_ops", "self_ns", "share", "bytes_moved", "weight_bytes", "flops")
ROW = ("layer", "name", "kind", "inputs", "outputs", "dtype", "begin_ns", *TOTAL[1:2], *TOTAL[3:])
PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")
SHAPE = ("shape.phase", "shape.num_rows", "shape.context")
LAYER_KINDS = ("norm", "qkv", "attention", "o_proj", "gate_up", "activation", "down", "between modules")
OTHER_KINDS = ("prepare", "embedding", "rotary", "head", "sample")
SCHEMA = {
    "schema_version",
    *(
        f"model.{key}"
        for key in (
            "name", "path", "family", "model_type", "format", "weights", "dtype", "quantization", "max_model_len",
            "implementation", "num_threads",
        )
    ),
    *(f"footprint.parts[].{key}" for key in ("part", "num_parameters", "stored_bytes")),
    *(f"footprint.parts[].bytes_by_precision.{name}" for name in PRECISIONS),
    *(f"footprint.weights_bytes.{name}" for name in PRECISIONS),
    *(f"footprint.kv_bytes_per_token.{name}" for name in ("float32", "16 bits", "8 bits")),
    *(f"footprint.{key}" for key in ("tied_head", "planned_bytes", "activations_bytes", "free_bytes")),
    *(f"footprint.{key}" for key in ("activation_tokens", "num_parameters")),
    *(f"footprint.batches[].{key}" for key in ("weights", "kv", "context", "num_sequences")),
    *(f"load.files[].{key}" for key in ("name", "num_bytes")),
    *(f"load.outcomes[].{key}" for key in ("outcome", "num_tensors", "num_bytes")),
    *(f"load.phases_s.{key}" for key in ("build", "read", "fill", "finish")),
    *(f"load.{key}" for key in ("fused", "left_out", "ties", "resident_bytes", "file_bytes", "total_s", "bytes_per_s")),
    *(f"trace.times[].{key}" for key in (*SHAPE, "duration_ns")),
    "trace.skipped",
    *(f"trace.{phase}.{key}" for phase in ("prefill", "decode") for key in (*SHAPE, "duration_ns", "traced_ns")),
    *(f"trace.{phase}.overhead_share" for phase in ("prefill", "decode")),
    *(f"trace.{phase}.by_kind[].{key}" for phase in ("prefill", "decode") for key in ("kind",)),
    *(f"trace.{phase}.by_layer[].layer" for phase in ("prefill", "decode")),
    *(
        f"trace.{phase}.{by}[].total.{key}"
        for phase in ("prefill", "decode") for by in ("by_kind", "by_layer") for key in TOTAL
    ),
    *(
        f"trace.{phase}.by_layer[].self_ns_by_kind.{kind}"
        for phase in ("prefill", "decode") for kind in (*LAYER_KINDS, *OTHER_KINDS)
    ),
    *(
        f"trace.{phase}.rows[].{key}{end}"
        for phase in ("prefill", "decode") for key in ROW
        for end in (("", "[][]") if key in ("inputs", "outputs") else ("",))
    ),
    *(f"flowcharts[].{key}" for key in ("phase", "num_tokens")),
    "flowcharts[].sections[].layers",
    "flowcharts[].sections[].layers[]",
    "flowcharts[].sections[].blocks[].kind",
    "flowcharts[].sections[].blocks[].names[]",
    "flowcharts[].sections[].blocks[].self_ns",
    *(f"flowcharts[].sections[].blocks[].{key}{end}" for key in ("inputs", "outputs") for end in ("", "[]")),
}  # fmt: skip


def test_the_shape_of_the_json_is_part_of_the_contract(inspection: Inspection) -> None:
    shown = json.loads(format_json(inspection))
    assert shown["schema_version"] == 1
    assert set(_keys(shown)) == SCHEMA


def test_shares_add_up(inspection: Inspection) -> None:
    trace = json.loads(format_json(inspection))["trace"]
    for phase in ("prefill", "decode"):
        step = trace[phase]
        all_ns = sum(row["self_ns"] for row in step["rows"])
        assert 0 < all_ns <= step["traced_ns"]
        by_kind = {total["kind"]: total["total"]["share"] for total in step["by_kind"]}
        products = ("qkv", "attention", "o_proj", "gate_up", "down", "head")
        assert step["overhead_share"] == pytest.approx(1 - sum(by_kind[kind] for kind in products))
        for totals in (step["by_kind"], step["by_layer"]):
            assert sum(total["total"]["self_ns"] for total in totals) == all_ns
            assert sum(total["total"]["share"] for total in totals) == pytest.approx(1.0)
    assert [(t["shape"]["num_rows"], t["shape"]["context"]) for t in trace["times"]] == [
        (1, 8),
        (2, 8),
        (1, 20),
        (2, 20),
    ]
    assert (trace["prefill"]["shape"]["context"], trace["decode"]["shape"]["num_rows"]) == (20, 2)


class _Page(HTMLParser):
    """Notes what a page refers to, and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.num: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num[tag] = self.num.get(tag, 0) + 1
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num[tag] = self.num.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_else(inspection: Inspection) -> None:
    text = format_html(inspection)
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert {"script", "link", "img", "iframe"} & page.num.keys() == set()
    assert page.references == ["#footprint", "#load", "#trace", "#flowchart"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert page.num["svg"] == 1 + 1 + 2 + 2 * 2 + 2  # memory; load; growth; two plots and a flowchart a step
    assert "NaN" not in text
    assert "tiny <llama>" in "".join(page.texts)  # escaped, so that it is text
    assert "prefers-color-scheme: dark" in text


def test_colours_are_defined_twice(inspection: Inspection) -> None:
    text = format_html(inspection)
    for series in set(re.findall(r"var\((--series-\w+)\)", text)):
        assert len(re.findall(rf"{series}: #", text)) == 2, series


def test_text_says_it_all(inspection: Inspection) -> None:
    text = format_text(inspection)
    for title in (
        "Memory by part and precision",
        "KV cache",
        "Sequences that fit 977 KiB",
        "Loading: ",
        "Decode steps",
        "Prefill of 20 tokens: by kind",
        "Decode of 2 rows with 20 tokens of context: by layer",
        "Decode of 2 rows with 20 tokens of context: operations",
        "Flow of prefill, T = 20 tokens",
        "Flow of decode, T = 2 tokens",
    ):
        assert title in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_sections_that_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    inspection = inspect(tmp_path, sections=("footprint",))
    assert (inspection.load, inspection.trace, inspection.flowcharts) == (None, None, ())
    assert inspection.model.implementation is None
    assert "Loading" not in format_text(inspection)
    assert json.loads(format_json(inspection))["trace"] is None
    assert format_html(inspection).count("<section") == 1
    load = inspect(tmp_path, sections=("load",))
    assert load.footprint is None
    assert load.load is not None
    assert load.trace is None
    flow = inspect(tmp_path, sections=("flowchart",))
    assert flow.trace is None
    assert len(flow.flowcharts) == 2


def test_the_footprint_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_worker.engine.loader.iterate_weights", lambda plan: pytest.fail("weights are read"))
    assert inspect(tmp_path, sections=("footprint",)).footprint is not None


def test_steps_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    inspection = inspect(tmp_path, rows=(1, 2, 4), contexts=(64, 100))
    assert inspection.trace is not None
    assert [(time.shape.num_rows, time.shape.context) for time in inspection.trace.times] == [
        (1, 64), (2, 64), (4, 64), (1, 100), (2, 100)
    ]  # fmt: skip
    assert "4 × 100" in format_text(inspection)
    with pytest.raises(InvalidRequestError, match="--kv-cache-gib"):
        inspect(tmp_path, rows=(64,))
    many = inspect(tmp_path, rows=(1, 10), contexts=(8,), sections=("trace",), max_num_seqs=4)
    assert many.trace is not None
    assert [step.num_rows for step in many.trace.skipped] == [10]
    with pytest.raises(InvalidRequestError, match="--max-num-seqs"):
        inspect(tmp_path, rows=(10,), contexts=(8,), max_num_seqs=4)
    with pytest.raises(InvalidRequestError, match="--context 1000"):
        inspect(tmp_path, contexts=(1000,))


@pytest.mark.parametrize("model", ["mixtral", "deepseek_v3", "gpt2", "opt-projected"])
def test_other_families_have_reports_too(model: str, tmp_path: Path) -> None:
    inspection = inspect(tmp_path, model)
    page = _Page()
    page.feed(format_html(inspection))
    assert page.open == []
    json.loads(format_json(inspection))
    format_text(inspection)


def test_growth_is_plotted_where_more_than_one_size_was_measured(tmp_path: Path) -> None:
    by_rows, by_context = "Decode step by rows", "Decode step by context"
    one = format_html(inspect(tmp_path, rows=(2,), contexts=(8,), sections=("trace",)))
    assert by_rows not in one
    assert by_context not in one
    rows = format_html(inspect(tmp_path, rows=(1, 2), contexts=(8,), sections=("trace",)))
    assert by_rows in rows
    assert by_context not in rows
