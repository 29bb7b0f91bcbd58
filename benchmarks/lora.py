"""What LoRA adapters cost: throughput beside the base model's, and how long it takes to make one ready.

    python benchmarks/lora.py --url http://127.0.0.1:8000 --model smollm2-135m-instruct \\
        --model-path DIR --adapter-root ROOT --cases r16-8,r16-32,ranks --json results.json

The server is a controller whose workers have ROOT as --adapter-root, or any other with vLLM's /v1/load_lora_adapter.
The adapters are random, of all linear layers, and made below ROOT first (`random_adapters.py`); with --make-only that
is all. Closed-loop load as in `serve.py`, greedy, no two prompts alike. What is compared runs in turns, round by round,
so that whatever else the machine does falls on both; the figure is the median of the rounds' ratios.

    base        the base model against itself, 8 streams: how far from 1 a ratio of equals is on this machine
    r16-8       8 adapters of rank 16, one for each of 8 streams, against the base
    r16-32      32 adapters of rank 16, one for each of 32 streams, against the base
    ranks       8 streams over ranks 8 to 64 (mixed), over ranks of 32 (equal, the same sum), and the base;
                cost is seconds per token above the base's, its ratio mixed over equal
    zipf        32 streams over --num-registered adapters, Zipf 1.0; the worker's --max-cpu-loras is to be a tenth of
                them. With --resident-url also against a server that holds them all. Hits in host memory are compared
                with those of Belady's optimum for --host-places
    activation  an adapter is made active from host memory and from disk (wall time of the administrator's request),
                while 8 streams of the base run; the longest gap between two tokens of a stream meanwhile, over the
                median of its gaps just before. Needs the controller's /admin/variants

An API key, an administrator's where keys are needed, is taken from the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from adapter_server import AdapterServer
from arguments import new_file, positive_int
from lora_activation import MOVED, ActivationBench
from openai_client import RequestFailed
from random_adapters import DTYPES, AdapterSet, linear_shapes, make_adapters
from report import describe_run, now, write_report
from residency import Optimum, count_hits, zipf_trace
from serve import LevelResult, Load, run_level
from turns import Comparison, Side, compare

RANK_16 = AdapterSet("r16", (16,), 32)
MIXED_RANKS = AdapterSet("mixed", (8, 16, 16, 24, 32, 40, 56, 64), 8)
EQUAL_RANKS = AdapterSet("equal", (32,), 8)
CASES = ("base", "r16-8", "r16-32", "ranks", "zipf", "activation")
ACTIVATION_STREAMS = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """What the cases share; see the command line's help."""

    url: str
    model: str
    adapter_root: Path
    rounds: int
    prompt_tokens: int
    output_tokens: int
    requests_per_stream: int
    num_registered: int
    registered_rank: int
    host_places: int
    resident_url: str | None
    activations: int
    seed: int

    def load(self, url: str, models: Sequence[str], seed: str) -> Load:
        """Load of one run; another `seed` makes other prompts, so that no prefix cache helps."""
        return Load(
            url,
            tuple(models),
            "completions",
            self.prompt_tokens,
            self.output_tokens,
            greedy=True,
            ignore_eos=True,
            seed=zlib.crc32(f"{self.seed}/{seed}".encode()),
        )

    @property
    def registered(self) -> AdapterSet:
        return AdapterSet(f"zipf-r{self.registered_rank}", (self.registered_rank,), self.num_registered)

    def sets(self, cases: Sequence[str]) -> list[AdapterSet]:
        """The adapters that the cases need."""
        needed = {
            "r16-8": [RANK_16],
            "r16-32": [RANK_16],
            "ranks": [MIXED_RANKS, EQUAL_RANKS],
            "zipf": [self.registered],
            "activation": [MOVED],
        }
        return list(dict.fromkeys(made for case in cases for made in needed.get(case, [])))


@dataclass(frozen=True, slots=True)
class Residency:
    """Hits are requests that needed nothing from disk, of the measured trace in the order in which it was sent."""

    requests: int
    loads_from_disk: int
    hit_share: float
    optimum_hit_share: float
    of_optimum: float


class LoraBench:
    """Runs the cases. Raises, every case: RequestFailed, a request of a warm-up or about adapters failed."""

    def __init__(self, session: aiohttp.ClientSession, setting: Setting) -> None:
        self._session = session
        self._setting = setting
        self._server = AdapterServer(session, setting.url)

    async def run(self, case: str) -> dict[str, Any]:
        cases: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
            "base": self.base,
            "r16-8": lambda: self.distinct(8),
            "r16-32": lambda: self.distinct(32),
            "ranks": self.ranks,
            "zipf": self.zipf,
            "activation": self.activation,
        }
        return await cases[case]()

    def _side(self, name: str, models: Sequence[str] | None = None) -> Side:
        return Side(name, self._setting.url, (self._setting.model,) if models is None else tuple(models))

    async def base(self) -> dict[str, Any]:
        sides = [self._side("base"), self._side("base again")]
        await self._warm_up("base", 8, sides)
        return asdict(await self._compare("base", 8, sides))

    async def distinct(self, streams: int) -> dict[str, Any]:
        await self._server.load(RANK_16, self._setting.adapter_root)
        sides = [self._side("base"), self._side("adapters", RANK_16.names[:streams])]
        await self._warm_up(f"r16-{streams}", streams, sides)
        return asdict(await self._compare(f"r16-{streams}", streams, sides))

    async def ranks(self) -> dict[str, Any]:
        for adapters in (MIXED_RANKS, EQUAL_RANKS):
            await self._server.load(adapters, self._setting.adapter_root)
        sides = [self._side("base"), self._side("mixed", MIXED_RANKS.names), self._side("equal", EQUAL_RANKS.names)]
        await self._warm_up("ranks", 8, sides)
        found = await self._compare("ranks", 8, sides)
        seconds = {side: 1 / rate for side, rate in found.tokens_per_s.items()}
        equal_cost = seconds["equal"] - seconds["base"]
        cost_ratio = (seconds["mixed"] - seconds["base"]) / equal_cost if equal_cost > 0 else None
        return {**asdict(found), "cost_mixed_over_equal": cost_ratio}

    async def zipf(self) -> dict[str, Any]:
        setting = self._setting
        adapters = setting.registered
        await self._server.load(adapters, setting.adapter_root)
        per_round = 32 * setting.requests_per_stream
        trace = zipf_trace(adapters.num_adapters, (setting.rounds + 1) * per_round, 1.0, seed=setting.seed)
        names = [adapters.names[index] for index in trace]
        rounds = [names[begin : begin + per_round] for begin in range(0, len(names), per_round)]
        sides = [self._side("base"), self._side("zipf", rounds[0])]
        if setting.resident_url is not None:
            await AdapterServer(self._session, setting.resident_url).load(adapters, setting.adapter_root)
            sides.append(Side("all resident", setting.resident_url, tuple(rounds[0])))
        for side in sides:  # the first part of the trace fills the tiers
            await self._level(side, 32, f"zipf/{side.name}/warm-up")
        before = await self._server.loads_from_disk(adapters)

        def at(side: Side, number: int) -> Side:
            return side if side.name == "base" else replace(side, models=tuple(rounds[number + 1]))

        found = await self._compare("zipf", 32, sides, at)
        num_requests = setting.rounds * per_round
        loads = await self._server.loads_from_disk(adapters) - before
        optimum = count_hits(trace, setting.host_places, Optimum(trace), warm_up=per_round) / num_requests
        hits = 1 - loads / num_requests
        residency = Residency(num_requests, loads, hits, optimum, hits / optimum)
        resident = found.ratios.get("all resident")
        return {
            **asdict(found),
            "residency": asdict(residency),
            "of_all_resident": None if resident is None else found.ratios["zipf"] / resident,
        }

    async def activation(self) -> dict[str, Any]:
        setting = self._setting

        def load(seed: str) -> Load:
            return setting.load(setting.url, (setting.model,), seed)

        bench = ActivationBench(self._session, setting.url, setting.adapter_root, load)
        found = await bench.run(ACTIVATION_STREAMS, setting.activations)
        return {"streams": ACTIVATION_STREAMS, "activations": [asdict(one) for one in found]}

    async def _warm_up(self, case: str, streams: int, sides: Sequence[Side]) -> None:
        """One unmeasured request to each model, so that adapters are active."""
        for side in sides:
            await self._level(side, streams, f"{case}/{side.name}/warm-up", num_requests=len(side.models))

    async def _compare(
        self,
        case: str,
        streams: int,
        sides: Sequence[Side],
        at: Callable[[Side, int], Side] = lambda side, number: side,
    ) -> Comparison:
        """Run the sides in turns.

        Args:
            at: the side as it is in a round.
        """

        def run(side: Side, number: int) -> Awaitable[LevelResult]:
            return self._level(at(side, number), streams, f"{case}/{side.name}/{number}")

        return await compare(run, streams, sides, self._setting.rounds)

    async def _level(self, side: Side, streams: int, seed: str, num_requests: int | None = None) -> LevelResult:
        """Raises RequestFailed: none of the requests succeeded."""
        load = self._setting.load(side.url, side.models, seed)
        number = num_requests or streams * self._setting.requests_per_stream
        result = await run_level(self._session, load, streams, number, include_usage=True)
        if result.num_failed == result.num_requests:
            raise RequestFailed(f"{side.name}: {'; '.join(result.failures)}")
        return result


# ------------------------------------------------------------------------------------------------------ command line


def table(case: str, found: Mapping[str, Any]) -> str:
    """The rows of a case: what, figure."""
    rows: list[tuple[str, str]] = []
    if "error" in found:
        rows.append(("failed", found["error"]))
    for side, rate in found.get("tokens_per_s", {}).items():
        rows.append((f"{side}, {found['streams']} streams", f"{rate:.1f} tok/s, {found['ratios'][side]:.3f}"))
    if found.get("cost_mixed_over_equal") is not None:
        rows.append(("cost of mixed over equal ranks", f"{found['cost_mixed_over_equal']:.3f}"))
    if found.get("of_all_resident") is not None:
        rows.append(("zipf over all resident", f"{found['of_all_resident']:.3f}"))
    if "residency" in found:
        hits = found["residency"]
        rows.append(("hits, and of the optimum's", f"{hits['hit_share']:.3f}, {hits['of_optimum']:.3f}"))
    for one in found.get("activations", ()):
        median, longest = one["longest_gap_over_median"]
        rows.append((f"from {one['source']}", f"{one['median_ms']:.1f} ms, longest {one['longest_ms']:.1f}"))
        rows.append(("longest gap over median gap", f"{median:.2f}, largest {longest:.2f}"))
        median, longest = one["undisturbed_over_median"]
        rows.append(("the same without an activation", f"{median:.2f}, largest {longest:.2f}"))
    return "\n".join(f"| {case} | {what} | {figure} |" for what, figure in rows)


def failures_of(found: Mapping[str, Any]) -> list[str]:
    errors = [found["error"]] if "error" in found else []
    return errors + [
        f"{side}: {count} failed: {message}"
        for side, rounds in found.get("rounds", {}).items()
        for result in rounds
        for message, count in result["failures"].items()
    ]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base, as served (default: %(default)s)")
    parser.add_argument("--model-path", required=True, type=Path, metavar="DIR", help="its safetensors directory")
    parser.add_argument("--adapter-root", required=True, type=Path, metavar="DIR", help="the workers' own")
    parser.add_argument("--cases", type=_cases, default=CASES[:4], help=f"of {','.join(CASES)} (default: the first 4)")
    parser.add_argument("--make-only", action="store_true", help="make the adapters of the cases and stop")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of them (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of each comparison (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=positive_int, default=64, help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=positive_int, default=128, help="(default: %(default)s)")
    parser.add_argument(
        "--requests-per-stream", type=positive_int, default=2, help="in each round (default: %(default)s)"
    )
    parser.add_argument(
        "--num-registered", type=positive_int, default=1000, help="adapters of zipf (default: %(default)s)"
    )
    parser.add_argument("--registered-rank", type=positive_int, default=8, help="of them (default: %(default)s)")
    parser.add_argument("--host-places", type=positive_int, default=100, help="--max-cpu-loras (default: %(default)s)")
    parser.add_argument("--resident-url", help="of a second server, whose --max-cpu-loras holds all of them")
    parser.add_argument("--activations", type=positive_int, default=10, help="from each tier (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of adapters, prompts and traces (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="of a request (default: %(default)s)")
    parser.add_argument("--label", default="", help="kept in the JSON: which server, which settings")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    return parser.parse_args(arguments)


def _cases(text: str) -> tuple[str, ...]:
    cases = tuple(text.split(","))
    if unknown := set(cases) - set(CASES):
        raise argparse.ArgumentTypeError(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return cases


def _server_url(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


async def run(options: argparse.Namespace, setting: Setting, api_key: str | None) -> dict[str, dict[str, Any]]:
    """Run the cases one after the other and print the rows of each; a case that fails has only its `error`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        bench = LoraBench(session, setting)
        results = {}
        for case in options.cases:
            try:
                results[case] = await bench.run(case)
            except RequestFailed as error:
                results[case] = {"error": str(error)}
            print(table(case, results[case]), flush=True)
    return results


def main(arguments: Sequence[str], api_key: str | None) -> int:
    options = parse_arguments(arguments)
    setting = Setting(
        url=_server_url(options.url),
        model=options.model,
        adapter_root=options.adapter_root,
        rounds=options.rounds,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        requests_per_stream=options.requests_per_stream,
        num_registered=options.num_registered,
        registered_rank=options.registered_rank,
        host_places=options.host_places,
        resident_url=None if options.resident_url is None else _server_url(options.resident_url),
        activations=options.activations,
        seed=options.seed,
    )
    try:
        shapes = linear_shapes(options.model_path)
        for adapters in setting.sets(options.cases):
            print(f"making {adapters.num_adapters} adapters {adapters.prefix}-...", file=sys.stderr, flush=True)
            make_adapters(adapters, shapes, options.adapter_root, dtype=DTYPES[options.dtype], seed=options.seed)
        if options.make_only:
            return 0
        started_at = now()
        print("| case | what | figure |\n|---|---|---|", flush=True)
        results = asyncio.run(run(options, setting, api_key))
    except (ValueError, OSError) as error:
        print(f"lora.py: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        report = {
            "label": options.label,
            **describe_run("lora.py", arguments, started_at),
            "setting": {
                key: str(value) if isinstance(value, Path) else value for key, value in asdict(setting).items()
            },
            "adapter_dtype": options.dtype,
            "cases": results,
        }
        write_report(report, options.json)
    failures = [f"{case}: {line}" for case, found in results.items() for line in failures_of(found)]
    for line in failures:
        print(f"lora.py: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ.get("OPENAI_API_KEY")))
    except KeyboardInterrupt:
        sys.exit(130)
