"""`python -m model_worker inspect --model-path PATH|NAME`: see inside a model."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adapters import plan_load
from model_worker.applied_model import applied_model
from model_worker.config import add_model_flags, positive_int
from model_worker.engine.config import EngineConfig
from model_worker.engine.machine import check_num_threads
from model_worker.engine.models.decoder_spec import NATIVE_MODEL_TYPES
from model_worker.engine.ops.cpu.build import find_compiler
from model_worker.engine.ops.cpu.kernels import build_kernels, find_kernels
from model_worker.engine.ops.cpu.program import KernelLibrary
from model_worker.inspection.html_report import format_html
from model_worker.inspection.inspection import (
    DEFAULT_CONTEXTS,
    DEFAULT_ROWS,
    SECTIONS,
    Inspection,
    InspectRequest,
    inspect_model,
)
from model_worker.inspection.json_report import format_json
from model_worker.inspection.text_report import format_text
from model_worker.model_source import find_model
from registry.atomic_file import temporary_file, write_file
from registry.flags import add_flags, config_from_args
from registry.paths import default_cache_dir
from registry.standard_output import printing

_FORMATS: Mapping[str, Callable[[Inspection], str]] = {"table": format_text, "json": format_json, "html": format_html}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model_worker inspect",
        description="See inside a model: the memory it needs in each precision, how it was loaded, what a prefill and "
        "a decode step are made of and where their time goes. `--section footprint` reads no weights.",
    )
    add_model_flags(parser)
    seen = parser.add_argument_group("what to see")
    seen.add_argument(
        "--section",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        metavar="NAME",
        help=f"of {', '.join(SECTIONS)} (default: all)",
    )
    seen.add_argument(
        "--rows",
        type=_positive_ints,
        default=DEFAULT_ROWS,
        metavar="INT,...",
        help="sequences of the decode steps that are timed; the last is traced (default: 1,8,32)",
    )
    seen.add_argument(
        "--context",
        type=_positive_ints,
        default=DEFAULT_CONTEXTS,
        metavar="INT,...",
        help="tokens of each sequence, for the memory and for the steps; the last is traced (default: 128,1024)",
    )
    seen.add_argument(
        "--memory-gib",
        type=_positive_number,
        metavar="FLOAT",
        help="memory that the footprint plans for (default: what this machine has free)",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--format", choices=tuple(_FORMATS), default="table", help="(default: %(default)s)")
    out.add_argument("--output", type=Path, metavar="FILE", help="instead of standard output")
    add_flags(parser, EngineConfig, title="engine")
    return parser


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Look, and write what was seen.

    Raises:
        RootgraftError: the model cannot be found, read or loaded, or the output not written.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.memory_gib is not None and "footprint" not in args.section:
        parser.error("--memory-gib is for the section footprint, which is not asked for")
    if args.output is not None:
        _check_output(parser, args.output)
    check_num_threads(args.num_threads)
    config = config_from_args(args, EngineConfig)
    request = InspectRequest(
        sections=tuple(args.section),
        rows=args.rows,
        contexts=args.context,
        memory_bytes=None if args.memory_gib is None else int(args.memory_gib * 2**30),
    )
    cache_dir = default_cache_dir(environ)
    source = find_model(
        args.model_path, name="inspected", cache_dir=cache_dir, report=_say, has_deltas=bool(args.apply_delta)
    )
    has_kernels = config.model_impl != "transformers" and (
        find_kernels(cache_dir) is not None or find_compiler() is not None
    )
    plan = plan_load(
        applied_model(source.path, args.apply_delta, cache_dir),
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        deltas=args.apply_delta,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        native_model_types=NATIVE_MODEL_TYPES if has_kernels else (),
        # What is not loaded may be larger than this machine.
        memory_bytes=None if request.needs_weights else sys.maxsize,
    )
    name = Path(args.model_path).resolve().name if Path(args.model_path).exists() else args.model_path
    kernels = _kernels(cache_dir) if has_kernels and request.needs_weights else None
    text = _FORMATS[args.format](inspect_model(plan, config, request, name=name, kernels=kernels, report=_say))
    if args.output is not None:
        write_file(args.output, text.encode())
        return 0
    with printing():
        sys.stdout.write(text)
    return 0


def _check_output(parser: argparse.ArgumentParser, path: Path) -> None:
    """Before minutes are spent on what cannot be written."""
    if path.is_dir():
        parser.error(f"--output {path} is a directory; name a file in it")
    with temporary_file(path.parent):
        pass


def _kernels(cache_dir: Path) -> KernelLibrary:
    """The kernels for the native decoder, built where they are not: a worker would soon serve with them."""
    kernels = find_kernels(cache_dir)
    if kernels is None:
        _say("Building the CPU kernels")
        kernels = build_kernels(cache_dir)
    return kernels


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _positive_ints(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive_int(number) for number in text.split(",")}))


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
