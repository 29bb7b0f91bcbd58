"""Check rootgraft on this machine's NVIDIA GPU: run all GPU tests, then the benchmarks, and print one table.

Each part is a process of its own, so that one which fails leaves the others alone. All of them end within the time that
is set: each has a share of it, and whatever those before it have left over; of a part that is stopped, the figures stay
that it had by then. Needs only torch, triton, transformers, safetensors and pytest; rootgraft itself need not be
installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from gpu_figures import Figure, format_table, read_figures

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 480.0
NEEDED = ("torch", "triton", "transformers", "safetensors", "pytest")
OPTIONAL = ("vllm",)
_TAIL_LINES = 15
_MOST_PROCESSES = 8
_THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the check.

    Attributes:
        share: of the time for all parts, in proportion to the others' shares: the seconds that it is thought to take
            on an H200 with 16 processors.
        tests: pytest's arguments; or
        script: a benchmark that writes figures.
        arguments: of the script.
        needs_checkpoint: the script is told where the model of random weights is.
        needs_throughput: it is told what was measured before it, and how many seconds it has.
        package: that has to be there, else the script only says so.
    """

    share: float
    tests: tuple[str, ...] = ()
    script: str = ""
    arguments: tuple[str, ...] = ()
    needs_checkpoint: bool = False
    needs_throughput: bool = False
    package: str | None = None


def _peer(name: str) -> Part:
    arguments = ("--peer", name)
    return Part(
        60, script="gpu_peers.py", arguments=arguments, needs_checkpoint=True, needs_throughput=True, package=name
    )


PARTS: dict[str, Part] = {
    "kernels": Part(60, tests=("tests/gpu/test_kernels.py",)),
    "compile": Part(70, script="gpu_compile.py", needs_checkpoint=True),
    "attention": Part(25, script="gpu_attention.py"),
    "engine": Part(70, script="gpu_engine.py", needs_checkpoint=True),
    "parity": Part(60, tests=("tests/gpu/test_parity.py",)),
    "graphs": Part(25, tests=("tests/gpu/test_graphs.py",)),
    "variants": Part(65, script="gpu_variants.py", needs_checkpoint=True),
    "quantized": Part(40, script="gpu_quantized.py", needs_checkpoint=True),
    "transformers": _peer("transformers"),
    "vllm": _peer("vllm"),
}
"""In the order in which they are run. Those after `compile` find their kernels compiled in Triton's cache."""
_SHARE_OF_MISSING = 3.0  # of a part whose package is not there


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part.

    Attributes:
        problem: why it is not complete; "" where it is.
    """

    name: str
    seconds: float
    figures: list[Figure]
    problem: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", type=_part_names, default=tuple(PARTS), metavar="PART,...", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds for all (%(default)g)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep the model of random weights here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="result (default: in benchmarks/results)")
    options = parser.parse_args(arguments)
    machine = probe()
    if problem := why_not(machine):
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}", flush=True)
    outcomes = run_parts(options.only, options.budget, options.checkpoint)
    path = options.json or ROOT / "benchmarks" / "results" / _file_name(machine)
    path.write_text(json.dumps(report(machine, options.only, outcomes), indent=1) + "\n")
    print("\n" + format_table([figure for outcome in outcomes for figure in outcome.figures]))
    print(f"\nWritten to {path}.")
    failed = [f"{outcome.name} ({outcome.problem})" for outcome in outcomes if outcome.problem]
    print(f"NOT COMPLETE: {', '.join(failed)}" if failed else "All parts ran.")
    return 1 if failed else 0


def probe() -> dict[str, Any]:
    """Versions of what is needed, None for what is missing, and the name of the GPU, None where torch sees none."""
    found: dict[str, Any] = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    found |= {"python": sys.version.split()[0], "gpu": None, "memory_gib": None, "capability": None}
    if found["torch"] is None:
        return found
    import torch

    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"], found["memory_gib"] = properties.name, round(properties.total_memory / 2**30, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
    return found


def why_not(machine: dict[str, Any]) -> str:
    """Why the check cannot run here, and what helps; "" where it can."""
    missing = [name for name in NEEDED if machine[name] is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}. Install them: pip install {' '.join(missing)}"
    if machine["gpu"] is not None:
        return ""
    if machine["cuda"] is None:
        return (
            f"torch {machine['torch']} is a build without CUDA. Run this with a Python whose torch has it, where there "
            "is an NVIDIA GPU; without one, `scripts/test` runs all kernels under Triton's interpreter."
        )
    return (
        f"torch {machine['torch']} sees no NVIDIA GPU. Look at `nvidia-smi`: its driver has to know CUDA "
        f"{machine['cuda']} or newer, and CUDA_VISIBLE_DEVICES must not hide the GPU."
    )


def run_parts(names: Sequence[str], budget_s: float, checkpoint: Path | None) -> list[Outcome]:
    """One after the other, until the time is over."""
    begin_s = time.monotonic()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="rootgraft-gpu-check-") as scratch:
        for name, end_s in deadlines(names, budget_s).items():
            limit_s = begin_s + end_s - time.monotonic()
            if limit_s < 1:
                outcomes.append(Outcome(name, 0.0, [], "no time was left"))
                continue
            print(f"== {name}, {limit_s:.0f} s at most", flush=True)
            part = PARTS[name]
            command, wanted = command_of(part, name, Path(scratch), checkpoint, outcomes, limit_s)
            outcome = _run(name, part, command, wanted, limit_s)
            print(f"== {name}: {outcome.problem or 'ok'}, {outcome.seconds:.0f} s", flush=True)
            outcomes.append(outcome)
    return outcomes


def deadlines(names: Sequence[str], budget_s: float) -> dict[str, float]:
    """When each part has to end, in seconds from the start: what one leaves over goes to those after it."""
    shares = {name: PARTS[name].share if _is_there(PARTS[name].package) else _SHARE_OF_MISSING for name in names}
    ends = accumulate(shares.values())
    return {name: budget_s * end / sum(shares.values()) for name, end in zip(shares, ends, strict=True)}


def _is_there(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def command_of(
    part: Part, name: str, scratch: Path, checkpoint: Path | None, before: Sequence[Outcome], limit_s: float
) -> tuple[list[str], Path]:
    """How a part is run, and the file that it writes."""
    if part.tests:
        wanted = scratch / f"{name}.jsonl"
        pytest = ["-m", "pytest", "-c", str(ROOT / "tests" / "gpu" / "pytest.ini"), f"--rootdir={ROOT}"]
        if importlib.util.find_spec("xdist") is not None:  # most of their time goes into compiling
            pytest += ["-n", str(min(_MOST_PROCESSES, os.cpu_count() or 1))]
        return [sys.executable, *pytest, f"--outcomes={wanted}", *part.tests], wanted
    wanted = scratch / f"{name}.json"
    command = [sys.executable, str(ROOT / "benchmarks" / part.script), *part.arguments, "--json", str(wanted)]
    if part.needs_checkpoint:
        command += ["--checkpoint", str(checkpoint or scratch / "model")]
    if part.needs_throughput:
        command += ["--seconds", f"{limit_s:.0f}"]
        ours = [f.value for o in before for f in o.figures if f.name.startswith(_THROUGHPUT) and f.value is not None]
        command += [part for rate in ours[:1] for part in ("--ours", f"{rate:.1f}")]
    return command, wanted


def _run(name: str, part: Part, command: list[str], wanted: Path, limit_s: float) -> Outcome:
    """Run a part, with all processes that it starts, for at most so long."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings.pop("TRITON_INTERPRET", None)
    begin_s = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        seconds = time.monotonic() - begin_s
        log.seek(0)
        output = log.read()
    if part.tests:
        figures, problem = read_tests(name, wanted)
    else:
        figures, problem = read_figures(wanted), ""
    if status is None:
        problem = "; ".join(filter(None, (f"stopped after {limit_s:.0f} s", problem)))
    elif status != 0 and not problem:
        problem = f"ended with status {status}"
    if problem:
        print("\n".join(output.splitlines()[-_TAIL_LINES:]), flush=True)
    return Outcome(name, seconds, figures, problem)


def read_tests(name: str, path: Path) -> tuple[list[Figure], str]:
    """What tests/gpu/conftest.py wrote: how many tests passed of those that were run, and the problem, if any."""
    lines = path.read_text().splitlines() if path.is_file() else []
    counts = Counter(json.loads(line)["outcome"] for line in lines)
    num_run = counts["passed"] + counts["failed"]
    detail = f"{counts['passed']} of {num_run} passed, {counts['skipped']} skipped"
    problem = f"{counts['failed']} tests failed" if counts["failed"] else "" if num_run else "no test ran"
    share = counts["passed"] / num_run if num_run else None
    return [Figure(f"tests: {name}", share, "passed", 1.0, detail)], problem


def report(machine: dict[str, Any], names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What is written down."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["scripts/gpu-check", "--only", ",".join(names)]),
        "machine": machine,
        "parts": {o.name: {"seconds": round(o.seconds, 1), "problem": o.problem} for o in outcomes},
        "figures": [{**asdict(figure), "met": figure.met} for outcome in outcomes for figure in outcome.figures],
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """With what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _version(name: str) -> str | None:
    from importlib import metadata

    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _file_name(machine: dict[str, Any]) -> str:
    gpu = "-".join(str(machine["gpu"]).lower().replace("/", "-").split())
    return f"{datetime.now(UTC):%Y-%m-%d}-{gpu}-gpu-check.json"


def _part_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such part; there are {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
