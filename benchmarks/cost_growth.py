"""How the cost of a decode step grows with the number of streams and the length of their context.

    python benchmarks/cost_growth.py --model-path DIR --json results/NAME.json --svg ../docs/cost.svg
    python benchmarks/cost_growth.py --read results/NAME.json --svg ../docs/cost.svg

Each step computes one token for every stream, from the batch to the sampled tokens, as `python -m model_worker inspect`
times it: sequences of random tokens whose KV blocks lie apart as in a cache in use, the quickest of five runs (fewer
where a step is slow), nothing else of the server running. No step has speculation. All steps are measured in each of
--rounds rounds and the quickest counts, because whatever else the machine does only adds to a run.

Steps whose keys and values need more than --kv-cache-gib are left out, and listed in the JSON with the bytes that they
need. --read draws a measurement of before instead of making one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arguments import new_file, positive_int
from precisions import PRECISIONS, precision_names
from report import describe_run, now, write_report

from adapters import plan_load
from model_worker.engine.config import CacheConfig, EngineConfig, SchedulerConfig
from model_worker.engine.model_runner import ModelRunner
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.kernels import build_kernels
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.inspection.measured_step import StepShape, fits, time_step
from model_worker.inspection.svg_charts import Line, draw_lines
from registry.paths import default_cache_dir

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)

_GIB = 2**30
_CHUNK = 512  # tokens of the largest step


@dataclass(frozen=True, slots=True)
class Point:
    """One step; `step_ms` from the batch to the sampled tokens."""

    precision: str
    num_rows: int
    context: int
    step_ms: float


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A step that was not measured, because its keys and values are more than the cache."""

    num_rows: int
    context: int
    kv_bytes: int


def measure(
    path: Path,
    precision: str,
    shapes: Sequence[StepShape],
    kernels: KernelLibrary,
    config: EngineConfig,
    *,
    rounds: int,
) -> tuple[list[Point], list[LeftOut]]:
    """Time the steps of a model in one precision."""
    dtype, quantization = PRECISIONS[precision]
    plan = plan_load(
        path,
        dtype=dtype,
        quantization=quantization,
        max_model_len=max(shape.context for shape in shapes),
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        native_model_types=NATIVE_MODEL_TYPES,
    )
    runner = ModelRunner(plan, config, kernels=kernels)
    fitting = [shape for shape in shapes if fits(runner, shape)]
    best_ms = dict.fromkeys(fitting, float("inf"))
    for number in range(1, rounds + 1):
        for shape in fitting:
            step_ms = time_step(runner, shape).duration_ns / 1e6
            best_ms[shape] = min(best_ms[shape], step_ms)
            print(f"{precision}, round {number}: {shape.num_rows} x {shape.context}: {step_ms:.2f} ms", flush=True)
    points = [Point(precision, shape.num_rows, shape.context, round(ms, 3)) for shape, ms in best_ms.items()]
    kv_bytes = plan.memory.kv_bytes_per_token
    left_out = [
        LeftOut(shape.num_rows, shape.context, shape.num_rows * shape.context * kv_bytes)
        for shape in shapes
        if shape not in best_ms
    ]
    return points, left_out


# ---------------------------------------------------------------------------------------------- the plot

_PANEL_HEIGHT, _TITLE_HEIGHT = 272, 34
# One hue from light to dark: what the lines stand for is ordered. Legible on white and on black.
_COLOURS = ("#7fb2ea", "#62a0e4", "#478edc", "#3580d3", "#4f6fd0", "#6a62cc", "#8357c4", "#9a4cb8", "#b042a6")
_STYLE = f"""
svg {{ {" ".join(f"--series-{index}: {colour};" for index, colour in enumerate(_COLOURS))} }}
svg {{ --ink: #57564f; --line: #d4d3cc; }}
@media (prefers-color-scheme: dark) {{ svg {{ --ink: #b4b3aa; --line: #45443f; }} }}
text {{ fill: var(--ink); font: 13px system-ui, sans-serif; }}
.small {{ font-size: 11.5px; }}
.title {{ font-size: 15px; font-weight: 600; }}
.grid {{ stroke: var(--line); stroke-width: 1; }}
"""


def draw(points: Sequence[Point]) -> str:
    """An SVG file: for each precision the time of a step over streams and over context, and all on one scale."""
    marks: list[str] = []
    y = 0
    for precision in dict.fromkeys(point.precision for point in points):
        for title, svg in _panels([point for point in points if point.precision == precision]):
            marks.append(f'<text x="0" y="{y + 22}" class="title">{precision}: {title}</text>')
            marks.append(svg.replace("<svg ", f'<svg x="0" y="{y + _TITLE_HEIGHT}" width="860" height="272" ', 1))
            y += _TITLE_HEIGHT + _PANEL_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {y}" role="img"><style>{_STYLE}</style>'
        f"{''.join(marks)}</svg>\n"
    )


def _panels(points: Sequence[Point]) -> Iterator[tuple[str, str]]:
    rows = sorted({point.num_rows for point in points})
    contexts = sorted({point.context for point in points})
    by_rows = [
        (f"{context} tokens", [(p.num_rows, p.step_ms) for p in points if p.context == context]) for context in contexts
    ]
    by_context = [
        (f"{num} stream{'s' if num > 1 else ''}", [(p.context, p.step_ms) for p in points if p.num_rows == num])
        for num in rows
    ]
    for title, x_title, groups in (
        ("a decode step by streams, for each length of the context", "streams", by_rows),
        ("a decode step by context, for each number of streams", "tokens of context", by_context),
    ):
        lines = [
            Line(str(index * (len(_COLOURS) - 1) // max(len(groups) - 1, 1)), name, tuple(sorted(places)))
            for index, (name, places) in enumerate(groups)
        ]
        yield title, draw_lines(lines, lambda ms: f"{ms:g}", x_title=x_title, y_title="ms", log_y=True)


# ---------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="cost_growth.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model-path", type=Path, help="checkpoint directory or GGUF file to measure")
    source.add_argument("--read", type=Path, metavar="FILE", help="JSON file of an earlier measurement")
    parser.add_argument("--precision", type=precision_names, default=["bfloat16", "int8"], metavar="NAME,...")
    parser.add_argument("--rows", type=_numbers, default=ROWS, metavar="INT,...", help="numbers of streams")
    parser.add_argument("--context", type=_numbers, default=CONTEXTS, metavar="INT,...", help="tokens of each stream")
    parser.add_argument("--kv-cache-gib", type=float, default=8.0, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default: %(default)s)")
    parser.add_argument("--num-threads", type=positive_int, help="(default: one per core)")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    parser.add_argument("--svg", type=new_file, help="file for the plot")
    options = parser.parse_args(arguments)
    report = json.loads(options.read.read_text()) if options.read is not None else _measure_all(options, arguments)
    if options.json is not None:
        write_report(report, options.json)
    if options.svg is not None:
        options.svg.write_text(draw([Point(**point) for point in report["points"]]))
    return 0


def _measure_all(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    started_at = now()
    kernels = build_kernels(default_cache_dir(os.environ))
    config = EngineConfig(
        cache=CacheConfig(kv_cache_gib=options.kv_cache_gib),
        scheduler=SchedulerConfig(max_num_seqs=max(options.rows), max_num_batched_tokens=_CHUNK),
        num_threads=options.num_threads,
        model_impl="native",
    )
    shapes = [StepShape("decode", num_rows, context) for context in options.context for num_rows in options.rows]
    points: list[Point] = []
    left_out: list[LeftOut] = []
    for precision in options.precision:
        measured, left_out = measure(options.model_path, precision, shapes, kernels, config, rounds=options.rounds)
        points += measured
    return {
        **describe_run("cost_growth.py", arguments, started_at),
        "model": options.model_path.resolve().name,
        "kernels": kernels.level.name,
        "kv_cache_gib": options.kv_cache_gib,
        "rounds": options.rounds,
        "left_out": [asdict(step) for step in left_out],
        "points": [asdict(point) for point in points],
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive_int(number) for number in text.split(",")}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
