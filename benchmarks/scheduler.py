"""What a step costs beside the model: scheduler and block manager, in pure Python, without a model.

    python benchmarks/scheduler.py --json results.json

Every step is schedule, complete, and the appending of one token to each sequence that sampled, as the engine does it.
Four loads, each with `--num-seqs` sequences of about `--num-tokens` tokens in blocks of `--block-size`:

    decode      all decode; their block boundaries are spread over the steps
    boundary    all decode and reach their block boundaries in the same step: see max_ms
    churn       in every step one sequence ends and one of the same length arrives, half of it found in the prefix cache
    drafts      as decode, with the search for guesses (speculation) in text that never repeats itself

Times are in milliseconds of the wall clock, and in the mean also of the thread's own processor time, which a busy
machine does not lengthen much; garbage collection stays on. The best of `--repeats` runs is reported, because whatever
else the machine does only adds to a run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence as SequenceOf
from dataclasses import asdict, dataclass
from itertools import cycle

from arguments import new_file
from report import describe_run, now, write_report

from model_worker.engine.block_manager import BlockManager
from model_worker.engine.config import SchedulerConfig, SpeculationConfig
from model_worker.engine.outputs import FinishReason
from model_worker.engine.sampling_params import SamplingParams
from model_worker.engine.scheduler import Scheduler
from model_worker.engine.sequence import Sequence, SequenceGroup
from model_worker.engine.speculation.speculator import Speculator

_VOCAB_SIZE = 50_000
_SAMPLING = SamplingParams(max_tokens=2**31 - 1)


@dataclass(frozen=True, slots=True)
class Size:
    num_seqs: int
    num_tokens: int
    block_size: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Milliseconds of the steps of one run."""

    load: str
    cpu_mean_ms: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    max_ms: float


class Bench:
    """A scheduler full of running sequences, and the engine's part between two steps."""

    def __init__(self, size: Size, speculator: Speculator | None = None) -> None:
        self.size = size
        num_blocks = size.num_seqs * (-(-(2 * size.num_tokens + size.num_steps) // size.block_size) + 2)
        budget = size.num_seqs + size.num_tokens + size.block_size  # a whole prompt in one step
        config = SchedulerConfig(
            max_num_seqs=size.num_seqs, max_num_batched_tokens=budget, max_mixed_prefill_tokens=budget
        )
        self.scheduler = Scheduler(config, BlockManager(num_blocks, size.block_size), speculator=speculator)
        self._random = random.Random(0)
        self._sampled = cycle(self._random.choices(range(_VOCAB_SIZE), k=99_991))
        self._shared = self._random.choices(range(_VOCAB_SIZE), k=size.num_tokens // 2)
        self._next_id = 0

    def arrive(self, num_tokens: int) -> None:
        """Add a request whose first half is the same for all."""
        own = self._random.choices(range(_VOCAB_SIZE), k=num_tokens - len(self._shared))
        sequence = Sequence(self._next_id, 0, self._shared + own, _SAMPLING, seed=0)
        self.scheduler.add(SequenceGroup(str(self._next_id), [sequence], _SAMPLING, arrival_s=0.0))
        self._next_id += 1

    def fill(self, num_tokens_of: Callable[[int], int]) -> None:
        """Let all sequences arrive and compute their prompts."""
        for number in range(self.size.num_seqs):
            self.arrive(num_tokens_of(number))
            self.step()
        assert len(self.scheduler.running) == self.size.num_seqs

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.scheduler.complete(output)
        for item in output.scheduled:
            for sequence in item.sampled:
                sequence.append(next(self._sampled))

    def end_oldest(self) -> None:
        oldest = next(iter(self.scheduler.running))
        self.scheduler.finish(oldest, FinishReason.LENGTH)


def measure(load: str, size: Size) -> LoadResult:
    bench = Bench(size, Speculator(SpeculationConfig()) if load == "drafts" else None)
    spread = size.block_size if load != "boundary" else 1
    bench.fill(lambda number: size.num_tokens + number % spread)
    if load == "drafts":
        for _ in range(size.num_tokens // 8):  # until the prompts are indexed, 16 tokens a step
            bench.step()
    times, cpu_times = [], []
    for _ in range(size.num_steps):
        if load == "churn":
            bench.arrive(size.num_tokens)
        start, cpu_start = time.perf_counter(), time.thread_time()
        if load == "churn":
            bench.end_oldest()
        bench.step()
        cpu_times.append((time.thread_time() - cpu_start) * 1e3)
        times.append((time.perf_counter() - start) * 1e3)
    bench.scheduler.check_integrity()
    return LoadResult(
        load,
        cpu_mean_ms=round(statistics.fmean(cpu_times), 4),
        mean_ms=round(statistics.fmean(times), 4),
        p50_ms=round(statistics.median(times), 4),
        p99_ms=round(statistics.quantiles(times, n=100)[98], 4),
        max_ms=round(max(times), 4),
    )


def main(arguments: SequenceOf[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scheduler.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--num-tokens", type=int, default=4000)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=200, help="measured steps of a run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each load, of which the best is reported")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    options = parser.parse_args(arguments)
    size = Size(options.num_seqs, options.num_tokens, options.block_size, options.num_steps)
    results = []
    for load in ("decode", "boundary", "churn", "drafts"):
        result = min((measure(load, size) for _ in range(options.repeats)), key=lambda result: result.cpu_mean_ms)
        print(json.dumps(asdict(result)), flush=True)
        results.append(result)
    if options.json is not None:
        report = {
            **describe_run("scheduler.py", arguments, now()),
            "size": asdict(size),
            "loads": [asdict(result) for result in results],
        }
        write_report(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
