"""Closed-loop load over HTTP against any OpenAI-compatible server.

    python benchmarks/serve.py --url http://127.0.0.1:8000 --model smollm2-135m-instruct \\
        --streams 1,8,32 --greedy --ignore-eos --json results.json

Each level keeps a fixed number of streams busy: a stream sends its next request when its last one has ended. Prompts
are random common words, about one token each, and no two requests have the same, so that a prefix cache does not help.

Output tokens are counted by the server's `usage` where it sends one, else one for each chunk that has text; the output
says which. TTFT is the time from sending a request to its first text, inter-token time the time between two chunks that
have text. A request that fails is counted, shown, and makes the exit status 1. An API key is taken from the environment
variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
from arguments import new_file, positive_int
from openai_client import Answer, Endpoint, RequestFailed, stream_answer
from report import describe_run, now, write_report

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music market sense nation plan college"
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: see the command line's help."""

    url: str
    models: tuple[str, ...]
    endpoint: Endpoint
    prompt_tokens: int
    output_tokens: int
    greedy: bool
    ignore_eos: bool
    seed: int

    def fields(self, *, include_usage: bool) -> dict[str, Any]:
        """Fields of the request body; those that not every server knows only when they were asked for."""
        fields: dict[str, Any] = {"max_tokens": self.output_tokens}
        if self.greedy:
            fields["temperature"] = 0
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if include_usage:
            fields["stream_options"] = {"include_usage": True}
        return fields

    def prompt(self, name: str) -> str:
        """The prompt of the request `name`: always the same words for a seed and a name."""
        words = random.Random(f"{self.seed}/{name}")
        return " ".join(words.choices(_WORDS.split(), k=self.prompt_tokens))


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class LevelResult:
    """What one level measured. Times and tokens are of the requests that succeeded.

    Attributes:
        wall_s: from the first request sent to the last one ended.
        output_tokens_from: "usage", "chunks", or "usage and chunks" where only some requests came with usage.
        num_short: requests with fewer output tokens than asked for; they make figures of two servers hard to compare.
        failures: message to number of requests.
    """

    streams: int
    num_requests: int
    num_failed: int
    num_short: int
    failures: dict[str, int]
    wall_s: float
    prompt_tokens: int | None
    output_tokens: int
    output_tokens_from: str
    output_tokens_per_s: float
    requests_per_s: float
    ttft_s: Percentiles | None
    inter_token_s: Percentiles | None


async def run_level(
    session: aiohttp.ClientSession, load: Load, streams: int, num_requests: int, *, include_usage: bool
) -> LevelResult:
    """Send `num_requests` requests, `streams` at once, spread over the models in turn."""
    fields = load.fields(include_usage=include_usage)
    pending = iter(range(num_requests))
    answers: list[Answer] = []
    failures: Counter[str] = Counter()

    async def stream() -> None:
        for index in pending:
            model = load.models[index % len(load.models)]
            prompt = load.prompt(f"{streams}/{index}")
            try:
                answers.append(await stream_answer(session, load.url, load.endpoint, model, prompt, fields))
            except RequestFailed as error:
                failures[str(error)] += 1

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(streams, num_requests)):
            group.create_task(stream())
    return summarize(streams, answers, failures, time.perf_counter() - start_s, load.output_tokens)


def summarize(
    streams: int, answers: Sequence[Answer], failures: Counter[str], wall_s: float, wanted_tokens: int
) -> LevelResult:
    counted = [answer.completion_tokens for answer in answers]
    tokens = [
        len(answer.chunk_s) if answer.completion_tokens is None else answer.completion_tokens for answer in answers
    ]
    sources = sorted({"chunks" if number is None else "usage" for number in counted}, reverse=True)
    prompts = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    return LevelResult(
        streams=streams,
        num_requests=len(answers) + failures.total(),
        num_failed=failures.total(),
        num_short=sum(number < wanted_tokens for number in tokens),
        failures=dict(failures),
        wall_s=wall_s,
        prompt_tokens=sum(prompts) if len(prompts) == len(answers) else None,
        output_tokens=sum(tokens),
        output_tokens_from=" and ".join(sources),
        output_tokens_per_s=sum(tokens) / wall_s,
        requests_per_s=len(answers) / wall_s,
        ttft_s=percentiles([answer.chunk_s[0] - answer.start_s for answer in answers if answer.chunk_s]),
        inter_token_s=percentiles(
            [
                after - before
                for answer in answers
                for before, after in zip(answer.chunk_s, answer.chunk_s[1:], strict=False)
            ]
        ),
    )


def percentiles(values: Sequence[float]) -> Percentiles | None:
    """With linear interpolation between the two nearest values; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return Percentiles(at(0.5), at(0.9), at(0.99))


async def warm_up(session: aiohttp.ClientSession, load: Load) -> bool:
    """Send one unmeasured request to each model; returns whether the server takes `stream_options.include_usage`.

    Raises:
        RequestFailed: a model does not answer.
    """
    include_usage = True
    for model in load.models:
        prompt = load.prompt(f"warm-up/{model}")
        try:
            fields = load.fields(include_usage=include_usage)
            await stream_answer(session, load.url, load.endpoint, model, prompt, fields)
        except RequestFailed as error:
            if not include_usage or error.status not in (400, 422):
                raise
            await stream_answer(session, load.url, load.endpoint, model, prompt, load.fields(include_usage=False))
            include_usage = False
    return include_usage


async def run(
    load: Load, levels: Sequence[tuple[int, int]], timeout_s: float, api_key: str | None
) -> list[LevelResult]:
    """Run the levels (streams, requests) one after the other and print a row for each.

    Raises:
        RequestFailed: the server does not even answer the warm-up.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:
        include_usage = await warm_up(session, load)
        print(TABLE_HEAD, flush=True)
        results: list[LevelResult] = []
        for streams, num_requests in levels:
            result = await run_level(session, load, streams, num_requests, include_usage=include_usage)
            results.append(result)
            print(table_row(result), flush=True)
    return results


TABLE_HEAD = (
    "| streams | requests | failed | short | tok/s | counted by | TTFT ms p50/p90/p99 | inter-token ms p50/p90/p99 |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table_row(result: LevelResult) -> str:
    def milliseconds(times: Percentiles | None) -> str:
        return "-" if times is None else " / ".join(f"{value * 1e3:.1f}" for value in (times.p50, times.p90, times.p99))

    cells = (
        result.streams,
        result.num_requests,
        result.num_failed,
        result.num_short,
        f"{result.output_tokens_per_s:.1f}",
        result.output_tokens_from or "-",
        milliseconds(result.ttft_s),
        milliseconds(result.inter_token_s),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="of the server, for instance http://127.0.0.1:8000")
    parser.add_argument(
        "--model", required=True, action="append", help="repeat for several: requests take them in turn"
    )
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--streams", type=_counts, default=(1, 8, 32), help="requests at once, for each level: 1,8,32")
    parser.add_argument(
        "--num-requests", type=positive_int, help="of each level; default: twice its streams, at least 4"
    )
    parser.add_argument("--prompt-tokens", type=positive_int, default=128, help="words of a prompt, about a token each")
    parser.add_argument("--output-tokens", type=positive_int, default=128, help="max_tokens of a request")
    parser.add_argument("--greedy", action="store_true", help="send temperature 0")
    parser.add_argument("--ignore-eos", action="store_true", help="send ignore_eos, which not every server knows")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the prompts' words; a server that has answered a seed may have its prompts in a prefix cache",
    )
    parser.add_argument("--timeout-s", type=float, default=600.0, help="after which a request counts as failed")
    parser.add_argument("--label", default="", help="kept in the JSON: which server, which settings")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    return parser.parse_args(arguments)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))


def main(arguments: Sequence[str], api_key: str | None) -> int:
    options = parse_arguments(arguments)
    load = Load(
        url=options.url.rstrip("/").removesuffix("/v1"),
        models=tuple(options.model),
        endpoint=options.endpoint,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        greedy=options.greedy,
        ignore_eos=options.ignore_eos,
        seed=options.seed,
    )
    levels = [(streams, options.num_requests or max(4, 2 * streams)) for streams in options.streams]
    description = describe_run("serve.py", arguments, now())
    machine = description["machine"]
    print(f"{options.label or load.url}: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB\n")
    try:
        results = asyncio.run(run(load, levels, options.timeout_s, api_key))
    except RequestFailed as error:
        print(f"serve.py: {load.url} did not answer the warm-up request: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        report = {
            "label": options.label,
            **description,
            "load": asdict(load),
            "levels": [asdict(result) for result in results],
        }
        write_report(report, options.json)
    failures = [(result.streams, message, count) for result in results for message, count in result.failures.items()]
    for streams, message, count in failures:
        print(f"serve.py: at {streams} streams {count} failed: {message}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ.get("OPENAI_API_KEY")))
    except KeyboardInterrupt:
        sys.exit(130)
