"""Two situations that averages hide, over HTTP against any OpenAI-compatible server.

    python benchmarks/scenarios.py --url http://127.0.0.1:8000 --model smollm2-135m-instruct --json results.json

shared-prefix    requests one after the other that begin with the same words and end with words of their own: how long
                 the first token of the first takes, and of the others, which can find the beginning in a prefix cache
long-prompt      streams that have been decoding for a while, when one long prompt arrives: the gaps between their
                 tokens before it came and while it was computed, and when its own first token came

An API key is taken from the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import aiohttp
from arguments import new_file
from openai_client import Answer, RequestFailed, stream_answer
from report import describe_run, now, write_report
from serve import Load, Percentiles, percentiles


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Attributes: later_share: median of the later requests over the first."""

    prefix_words: int
    num_requests: int
    first_ttft_s: float
    later_ttft_s: Percentiles
    later_share: float


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """Gaps are between two chunks of one stream, in seconds.

    Attributes:
        prompt_tokens: of the long prompt, by the server's usage.
        gaps_before_s, gaps_during_s: of all streams, before the long prompt was sent and until its first token.
        longest_gap_s: during.
        ttft_s: of the long prompt.
    """

    streams: int
    prompt_tokens: int | None
    gaps_before_s: Percentiles
    gaps_during_s: Percentiles
    longest_gap_s: float
    ttft_s: float


class Scenarios:
    """Runs them; `seed` makes the words differ from those of an earlier run against the same server."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, seed: int) -> None:
        self._session = session
        self._url = url
        self._model = model
        self._seed = seed

    async def shared_prefix(self, prefix_words: int, num_requests: int) -> SharedPrefix:
        """Raises RequestFailed: a request failed."""
        await self._ask(self._words("warm-up", prefix_words), 1)  # or the first would also pay for what is cold
        prefix = self._words("prefix", prefix_words)
        ttft = []
        for index in range(num_requests):
            answer = await self._ask(f"{prefix} {self._words(f'own/{index}', 16)}", 8)
            ttft.append(answer.chunk_s[0] - answer.start_s)
        later = percentiles(ttft[1:])
        assert later is not None
        return SharedPrefix(prefix_words, num_requests, ttft[0], later, later.p50 / ttft[0])

    async def long_prompt(self, streams: int, prompt_words: int, settle_s: float) -> LongPrompt:
        """Raises RequestFailed: a request failed."""
        running = [asyncio.create_task(self._ask(self._words(f"stream/{index}", 64), 400)) for index in range(streams)]
        await asyncio.sleep(settle_s)
        sent = time.perf_counter()
        long = await self._ask(self._words("long", prompt_words), 1)
        came = long.chunk_s[0]
        answers = await asyncio.gather(*running)
        gaps = [pair for answer in answers for pair in pairwise(answer.chunk_s)]
        before = percentiles([b - a for a, b in gaps if sent - settle_s / 2 < a and b < sent])
        during = [b - a for a, b in gaps if b > sent and a < came]
        gaps_during = percentiles(during)
        if before is None or gaps_during is None:
            raise RequestFailed("the streams had ended before the long prompt arrived; use a smaller --settle")
        return LongPrompt(streams, long.prompt_tokens, before, gaps_during, max(during), came - sent)

    async def _ask(self, prompt: str, max_tokens: int) -> Answer:
        fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        fields["stream_options"] = {"include_usage": True}
        answer = await stream_answer(self._session, self._url, "completions", self._model, prompt, fields)
        if not answer.chunk_s:
            raise RequestFailed("an answer had no text")
        return answer

    def _words(self, name: str, number: int) -> str:
        load = Load(self._url, (self._model,), "completions", number, 1, True, True, self._seed)
        return load.prompt(name)


async def run(arguments: argparse.Namespace, api_key: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=arguments.timeout)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        scenarios = Scenarios(session, arguments.url, arguments.model, arguments.seed)
        shared = await scenarios.shared_prefix(arguments.prefix_words, arguments.num_requests)
        long = await scenarios.long_prompt(arguments.streams, arguments.long_words, arguments.settle)
    return {"shared_prefix": asdict(shared), "long_prompt": asdict(long)}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scenarios.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="of the server, for instance http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prefix-words", type=int, default=1000, help="that all requests share (default: 1000)")
    parser.add_argument("--num-requests", type=int, default=32, help="that share them (default: 32)")
    parser.add_argument("--streams", type=int, default=16, help="that are decoding (default: 16)")
    parser.add_argument("--long-words", type=int, default=4000, help="of the long prompt (default: 4000)")
    parser.add_argument("--settle", type=float, default=4.0, help="seconds that the streams run alone (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the words (default: 0)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request (default: 600)")
    parser.add_argument("--json", type=new_file, help="write the result here")
    parsed = parser.parse_args(arguments)
    if min(parsed.prefix_words, parsed.streams, parsed.long_words) < 1 or parsed.num_requests < 2:
        parser.error("numbers must be positive, and --num-requests at least 2")
    return parsed


def main(arguments: Sequence[str]) -> int:
    parsed = parse_arguments(arguments)
    started_at = now()
    try:
        results = asyncio.run(run(parsed, os.environ.get("OPENAI_API_KEY")))
    except RequestFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(results, indent=2))
    if parsed.json is not None:
        write_report({**describe_run("scenarios.py", arguments, started_at), **results}, parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
