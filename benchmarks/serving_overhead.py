"""What serving costs beside the model: CPU time per token of worker, controller and client.

    python benchmarks/serving_overhead.py --model-path smollm2-135m-instruct

Starts a controller and, for each level, a worker whose model takes a fixed time per step (constant_worker.py), and
streams from them over HTTP. With a step of 0 ms the rate is what the serving path can carry at most; else the figures
to look at are the CPU times, which other work on the machine disturbs less than the rate.

`worker loop` is the CPU time of the worker's main thread, `engine` that of its other threads: the engine's own Python.
`late` is by how much the mean time between two tokens of a stream is longer than the step, sleeping too long included.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil
from arguments import new_file
from openai_client import Answer, Endpoint, RequestFailed, stream_answer
from processes import LOG_NAME, free_ports, ready, started
from report import describe_run, now, write_report
from serve import percentiles

MODEL = "constant"


@dataclass(frozen=True, slots=True)
class Level:
    """How many streams, and how long the model's step takes."""

    streams: int
    step_ms: float

    @classmethod
    def parse(cls, text: str) -> Level:
        streams, _, step_ms = text.partition(":")
        return cls(int(streams), float(step_ms or 0))


@dataclass(frozen=True, slots=True)
class LevelResult:
    """What one level measured; CPU times in microseconds per output token.

    Attributes:
        ttft_ms: median from a request sent to its first text.
        late_ms: mean time between two tokens of a stream, less the step; None where the step is 0.
        chunks_per_token: below 1 where several tokens came in one chunk.
    """

    level: Level
    tokens_per_s: float
    chunks_per_token: float
    ttft_ms: float
    late_ms: float | None
    worker_loop_us: float
    worker_engine_us: float
    controller_us: float
    client_us: float


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds, user and system, that the processes have used so far."""

    worker_loop: float
    worker_engine: float
    controller: float
    client: float

    @classmethod
    def now(cls, worker: psutil.Process, controller: psutil.Process) -> CpuTimes:
        threads = {thread.id: thread.user_time + thread.system_time for thread in worker.threads()}
        loop = threads.pop(worker.pid)
        return cls(loop, sum(threads.values()), _cpu_s(controller), time.process_time())


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def run_level(
    session: aiohttp.ClientSession,
    url: str,
    level: Level,
    endpoint: Endpoint,
    num_tokens: int,
    worker: psutil.Process,
    controller: psutil.Process,
) -> LevelResult:
    fields = {"max_tokens": num_tokens, "ignore_eos": True, "stream_options": {"include_usage": True}}

    def request(name: str) -> asyncio.Task[Answer]:
        prompt = f"{name}: Explain what a hash table is."
        return asyncio.create_task(stream_answer(session, url, endpoint, MODEL, prompt, fields))

    await request("warm-up")
    before, start_s = CpuTimes.now(worker, controller), time.perf_counter()
    answers = await asyncio.gather(*[request(str(number)) for number in range(level.streams)])
    wall_s, after = time.perf_counter() - start_s, CpuTimes.now(worker, controller)
    tokens = sum(answer.completion_tokens or 0 for answer in answers)
    first = percentiles([answer.chunk_s[0] - answer.start_s for answer in answers])
    assert first is not None
    chunks = sum(len(answer.chunk_s) for answer in answers)
    streamed_s = sum(answer.chunk_s[-1] - answer.chunk_s[0] for answer in answers)
    return LevelResult(
        level=level,
        tokens_per_s=tokens / wall_s,
        chunks_per_token=chunks / tokens,
        ttft_ms=first.p50 * 1e3,
        late_ms=streamed_s / max(1, tokens - level.streams) * 1e3 - level.step_ms if level.step_ms else None,
        worker_loop_us=(after.worker_loop - before.worker_loop) / tokens * 1e6,
        worker_engine_us=(after.worker_engine - before.worker_engine) / tokens * 1e6,
        controller_us=(after.controller - before.controller) / tokens * 1e6,
        client_us=(after.client - before.client) / tokens * 1e6,
    )


TABLE_HEAD = (
    "| streams | step ms | tok/s | chunks/token | TTFT ms | late ms "
    "| worker loop us | engine us | controller us | client us |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table_row(result: LevelResult) -> str:
    cells = (
        str(result.level.streams),
        f"{result.level.step_ms:g}",
        f"{result.tokens_per_s:.0f}",
        f"{result.chunks_per_token:.2f}",
        f"{result.ttft_ms:.1f}",
        "-" if result.late_ms is None else f"{result.late_ms:.2f}",
        f"{result.worker_loop_us:.0f}",
        f"{result.worker_engine_us:.0f}",
        f"{result.controller_us:.0f}",
        f"{result.client_us:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _worker_command(level: Level, model_path: str, controller: str) -> tuple[str, ...]:
    script = str(Path(__file__).with_name("constant_worker.py"))
    where = ("--port", "0", "--controller", controller)
    return (script, str(level.step_ms), "--model-path", model_path, "--model-name", MODEL, *where)


async def run(options: argparse.Namespace, directory: Path) -> list[LevelResult]:
    """Run every level with a worker of its own and print a row for each.

    Raises:
        RequestFailed: a process does not start, or a request fails; the logs are in `directory`.
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    results: list[LevelResult] = []
    database = f"sqlite:///{directory / 'catalog.sqlite3'}"
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    log = directory / LOG_NAME
    command = ("-m", "controller", "--port", str(port), "--database", database)
    async with aiohttp.ClientSession(connector=connector) as session:
        with started(log, *command) as controller:
            await ready(session, url, 0, [controller])
            print(TABLE_HEAD, flush=True)
            for level in options.levels:
                with started(log, *_worker_command(level, options.model_path, url)) as worker:
                    await ready(session, url, 1, [controller, worker])
                    result = await run_level(
                        session,
                        url,
                        level,
                        options.endpoint,
                        options.output_tokens,
                        psutil.Process(worker.pid),
                        psutil.Process(controller.pid),
                    )
                await ready(session, url, 0, [controller])
                results.append(result)
                print(table_row(result), flush=True)
    return results


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serving_overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="of whose tokenizer and chat template are used")
    parser.add_argument(
        "--levels",
        type=lambda text: [Level.parse(part) for part in text.split(",")],
        default="1:4,8:8,32:20,1:0,8:0,32:0",
        help="STREAMS:STEP_MS of each level (default: %(default)s)",
    )
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="chat")
    parser.add_argument("--output-tokens", type=int, default=1000, help="of each request")
    parser.add_argument("--json", type=new_file, help="file for machine and results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    started_at = now()
    with tempfile.TemporaryDirectory(prefix="serving-overhead-") as name:
        try:
            results = asyncio.run(run(options, Path(name)))
        except RequestFailed as error:
            log = (Path(name) / LOG_NAME).read_text(errors="replace")
            print(f"serving_overhead.py: {error}\n{log[-2000:]}", file=sys.stderr)
            return 1
    if options.json is not None:
        report = {
            **describe_run("serving_overhead.py", arguments, started_at),
            "levels": [asdict(result) for result in results],
        }
        write_report(report, options.json)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
