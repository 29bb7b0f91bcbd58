"""What full fine-tunes cost as deltas: in bytes, in time to make them, in throughput, and against models of their own.

    python benchmarks/deltas.py --base DIR --targets T1,T2,T3,T4,T5,T6,T7,T8 --json results.json

Makes a delta of each target with `python -m delta make`, then serves all of them beside the base in one worker, each
under its own name. Closed-loop load as in `serve.py`, greedy, no two prompts alike; what is compared runs in turns, and
the figure is the median of the rounds' ratios.

    files       bytes of a delta over those of the model, and seconds of making and applying one, in one thread, over
                those of reading and writing as many bytes once
    one         one stream of one delta against one of the base
    distinct    as many streams as targets, each of a delta of its own, against as many streams of the base
    separate    the same streams against a worker of its own for each target, all on this machine: tokens per second,
                and memory (proportional set size: pages that processes share are divided among them)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from arguments import new_file
from openai_client import RequestFailed
from processes import LOG_NAME, free_ports, ready, started
from report import describe_run, now, write_report
from serve import LevelResult, Load, run_level
from turns import Comparison, Side, compare

BASE = "base"
CASES = ("files", "one", "distinct", "separate")
_CHUNK_BYTES = 4 << 20


def make_deltas(options: argparse.Namespace, root: Path) -> list[Path]:
    """A delta of each target.

    Raises:
        RequestFailed: one cannot be made; the message is the tool's.
    """
    made = []
    for number, target in enumerate(options.targets):
        out = root / f"delta-{number}"
        print(f"making {out.name} of {target.name}", file=sys.stderr, flush=True)
        _delta_tool("make", "--base", options.base, "--target", target, "--out", out, *_codec_flags(options))
        made.append(out)
    return made


def measure_files(options: argparse.Namespace, delta: Path, scratch: Path) -> dict[str, Any]:
    """Sizes and times of the first delta; a time is the median of those of all rounds.

    What was written stays until the end: files in memory that was just given back are written three times as fast.
    """
    target: Path = options.targets[0]
    weights = [*options.base.glob("*.safetensors")]
    model_bytes = sum(file.stat().st_size for file in weights)
    making = ("make", "--base", options.base, "--target", target, *_codec_flags(options))
    applying = ("apply", "--base", options.base, "--delta", delta)
    rounds = []
    for number in range(options.rounds):
        directory = scratch / str(number)
        directory.mkdir()
        copy_s = _copy_s(weights, directory)
        make_s = _delta_tool(*making, "--out", directory / "delta")
        apply_s = _delta_tool(*applying, "--out", directory / "applied")
        rounds.append((copy_s, make_s, apply_s, _delta_tool("--help")))
    copy_s, make_s, apply_s, empty_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    delta_bytes = sum(file.stat().st_size for file in delta.rglob("*") if file.is_file())
    description = json.loads((delta / "delta_config.json").read_text())
    return {
        "model_bytes": model_bytes,
        "delta_bytes": delta_bytes,
        "delta_over_model": delta_bytes / model_bytes,
        "quality": description.get("quality"),
        "read_and_write_s": copy_s,
        "start_of_python_s": empty_s,
        "make_s": make_s,
        "apply_s": apply_s,
        "make_over_read_and_write": (make_s - empty_s) / copy_s,
        "apply_over_read_and_write": (apply_s - empty_s) / copy_s,
        "rounds_of_read_and_write_make_apply_start_s": rounds,
    }


def _codec_flags(options: argparse.Namespace) -> list[str]:
    return [
        "--no-quality",
        "--codec",
        options.codec,
        *(part for kind in options.residual for part in ("--residual", kind)),
    ]


def _delta_tool(*arguments: str | Path) -> float:
    """Run `python -m delta` in one thread. -> its seconds"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    start_s = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "delta", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RequestFailed(f"delta {arguments[0]}: {done.stderr.strip()[-500:]}")
    return time.perf_counter() - start_s


def _copy_s(files: Sequence[Path], scratch: Path) -> float:
    """Seconds of reading the files and writing them to the disk."""
    start_s = time.perf_counter()
    for file in files:
        with file.open("rb") as source, (scratch / file.name).open("wb") as copy:
            shutil.copyfileobj(source, copy, _CHUNK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
    return time.perf_counter() - start_s


class DeltaBench:
    """Runs the cases that need servers. Raises, every method: RequestFailed, a process or a warm-up failed."""

    def __init__(self, session: aiohttp.ClientSession, options: argparse.Namespace, directory: Path) -> None:
        self._session = session
        self._options = options
        self._directory = directory
        self._streams = len(options.targets)
        self._names = [f"delta-{number}" for number in range(self._streams)]

    async def beside(self, deltas: Sequence[Path], cases: Sequence[str]) -> dict[str, Any]:
        """`one` and `distinct`, and the throughput and memory of all deltas in one worker."""
        flags = [f"--delta={name}={path},pin" for name, path in zip(self._names, deltas, strict=True)]
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            url, workers = await self._serve(stack, [(BASE, self._options.base, flags)])
            base, variants = Side(BASE, url, (BASE,)), Side("deltas", url, tuple(self._names))
            await self._warm_up([base, variants])
            if "one" in cases:
                one = Side("delta", url, (self._names[0],))
                found["one"] = asdict(await self._compare("one", 1, [base, one]))
            if "distinct" in cases or "separate" in cases:
                compared = await self._compare("distinct", self._streams, [base, variants])
                found["distinct"] = {**asdict(compared), "worker_mib": _memory_mib(workers)}
        return found

    async def separate(self) -> dict[str, Any]:
        """A worker for each target."""
        models = [(name, path, []) for name, path in zip(self._names, self._options.targets, strict=True)]
        with ExitStack() as stack:
            url, workers = await self._serve(stack, models)
            side = Side("separate", url, tuple(self._names))
            await self._warm_up([side])
            compared = await self._compare("separate", self._streams, [side])
            return {**asdict(compared), "worker_mib": _memory_mib(workers)}

    async def _serve(
        self, stack: ExitStack, models: Sequence[tuple[str, Path, Sequence[str]]]
    ) -> tuple[str, list[psutil.Process]]:
        """Start a controller, and a worker for each (name, path, flags). -> URL, the workers"""
        (port,) = free_ports(1)
        url, log = f"http://127.0.0.1:{port}", self._directory / LOG_NAME
        database = f"sqlite:///{self._directory / f'catalog-{port}.sqlite3'}"
        controller = stack.enter_context(started(log, "-m", "controller", "--port", str(port), "--database", database))
        workers = []
        for name, path, flags in models:
            command = ("-m", "model_worker", "--controller", url, "--port", "0", "--model-path", str(path))
            own = ("--model-name", name, "--dtype", self._options.dtype, "--speculation", "off", *flags)
            workers.append(stack.enter_context(started(log, *command, *own)))
            await ready(self._session, url, len(workers), [controller, *workers])
        return url, [psutil.Process(worker.pid) for worker in workers]

    async def _warm_up(self, sides: Sequence[Side]) -> None:
        for side in sides:
            result = await self._level(side, self._streams, f"{side.name}/warm-up", num_requests=len(side.models))
            if result.failures:
                raise RequestFailed(f"{side.name}: {'; '.join(result.failures)}")

    async def _compare(self, case: str, streams: int, sides: Sequence[Side]) -> Comparison:
        async def run(side: Side, number: int) -> LevelResult:
            num_requests = streams * self._options.requests_per_stream
            return await self._level(side, streams, f"{case}/{side.name}/{number}", num_requests)

        return await compare(run, streams, sides, self._options.rounds)

    async def _level(self, side: Side, streams: int, seed: str, num_requests: int) -> LevelResult:
        options = self._options
        load = Load(
            side.url, side.models, "completions", options.prompt_tokens, options.output_tokens,
            greedy=True, ignore_eos=True, seed=zlib.crc32(seed.encode()),
        )  # fmt: skip
        result = await run_level(self._session, load, streams, num_requests, include_usage=True)
        if result.num_failed == result.num_requests:
            raise RequestFailed(f"{side.name}: {'; '.join(result.failures)}")
        return result


def _memory_mib(processes: Sequence[psutil.Process]) -> float:
    return float(sum(process.memory_full_info().pss for process in processes)) / 2**20


async def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    deltas = make_deltas(options, directory)
    found: dict[str, Any] = {}
    if "files" in options.cases:
        scratch = directory / "scratch"
        scratch.mkdir()
        found["files"] = measure_files(options, deltas[0], scratch)
        shutil.rmtree(scratch)
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        bench = DeltaBench(session, options, directory)
        if {"one", "distinct", "separate"} & set(options.cases):
            found |= await bench.beside(deltas, options.cases)
        if "separate" in options.cases:
            separate = await bench.separate()
            together = found["distinct"]
            found["separate"] = {
                **separate,
                "deltas_over_separate": together["tokens_per_s"]["deltas"] / separate["tokens_per_s"]["separate"],
                "memory_over_separate": together["worker_mib"] / separate["worker_mib"],
            }
    return found


def table(found: dict[str, Any]) -> str:
    rows = []
    files = found.get("files", {})
    for key in ("delta_over_model", "make_over_read_and_write", "apply_over_read_and_write", "make_s", "apply_s"):
        if key in files:
            rows.append(("files", key.replace("_", " "), f"{files[key]:.3f}"))
    for case in ("one", "distinct", "separate"):
        for side, rate in found.get(case, {}).get("tokens_per_s", {}).items():
            rows.append((case, side, f"{rate:.1f} tok/s, {found[case]['ratios'][side]:.3f}"))
        for key in ("worker_mib", "deltas_over_separate", "memory_over_separate"):
            if key in found.get(case, {}):
                rows.append((case, key.replace("_", " "), f"{found[case][key]:.2f}"))
    return "\n".join(["| case | what | figure |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)])


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deltas.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, type=Path, metavar="DIR", help="safetensors directory")
    parser.add_argument("--targets", required=True, type=_paths, metavar="DIR,DIR,...", help="full fine-tunes of it")
    parser.add_argument("--cases", type=_cases, default=CASES, help=f"of {','.join(CASES)} (default: all)")
    parser.add_argument("--codec", default="sign", help="of the deltas (default: %(default)s)")
    parser.add_argument("--residual", action="append", default=[], help="of the deltas; may be repeated")
    parser.add_argument("--dtype", default="bfloat16", help="of the base as it is served (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of every case, files too (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--requests-per-stream", type=int, default=2, help="in each round (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of a request (default: %(default)s)")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    return parser.parse_args(arguments)


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",")]


def _cases(text: str) -> tuple[str, ...]:
    cases = tuple(text.split(","))
    if unknown := set(cases) - set(CASES):
        raise argparse.ArgumentTypeError(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return cases


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    started_at = now()
    with tempfile.TemporaryDirectory(prefix="deltas-") as name:
        try:
            found = asyncio.run(run(options, Path(name)))
        except RequestFailed as error:
            log = Path(name) / LOG_NAME
            shown = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            print(f"deltas.py: {error}\n{shown}", file=sys.stderr)
            return 1
    print(table(found))
    if options.json is not None:
        report = {
            **describe_run("deltas.py", arguments, started_at),
            "setting": {key: _shown(value) for key, value in vars(options).items() if key != "json"},
            **found,
        }
        write_report(report, options.json)
    return 0


def _shown(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
