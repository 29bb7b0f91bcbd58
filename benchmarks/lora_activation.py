"""How long it takes to make an adapter active, and what streams that are under way notice of it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import aiohttp
from adapter_server import AdapterServer
from openai_client import Answer, RequestFailed, stream_answer
from random_adapters import AdapterSet
from serve import Load

MOVED = AdapterSet("moved", (16,), 1)
_QUIET_S = 1.0  # before and after each activation

Source = Literal["host memory", "disk"]
Span = tuple[float, float]
"""Begin and end, in seconds of the monotonic clock of `openai_client`."""


@dataclass(frozen=True, slots=True)
class Activation:
    """Times of the requests in milliseconds, and what running streams noticed.

    Attributes:
        longest_gap_over_median: of each stream and activation: its longest gap between tokens meanwhile, over the
            median of its gaps in the quiet time just before; the median and the largest of them.
        undisturbed_over_median: the same of spans of the same lengths in that quiet time.
    """

    source: Source
    times_ms: list[float]
    median_ms: float
    longest_ms: float
    longest_gap_over_median: tuple[float, float]
    undisturbed_over_median: tuple[float, float]


class ActivationBench:
    """
    Args:
        load: of a stream's request, by a name that makes its prompt differ.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, adapter_root: Path, load: Callable[[str], Load]
    ) -> None:
        self._session = session
        self._server = AdapterServer(session, url)
        self._adapter_root = adapter_root
        self._load = load

    async def run(self, streams: int, activations: int) -> list[Activation]:
        """Activate an adapter so many times from each tier while streams of the base run.

        Raises:
            RequestFailed: a request failed, or the streams were not under way during an activation.
        """
        stop = asyncio.Event()
        answers: list[list[Answer]] = [[] for _ in range(streams)]
        running = [asyncio.create_task(self._stream(number, answers[number], stop)) for number in range(streams)]
        try:
            await asyncio.sleep(_QUIET_S)
            spans: dict[Source, list[Span]] = {
                "host memory": await self._activate("host memory", activations),
                "disk": await self._activate("disk", activations),
            }
        finally:
            stop.set()
            await asyncio.gather(*running)
        gaps = [[pair for answer in stream for pair in pairwise(answer.chunk_s)] for stream in answers]
        return [summarize(source, found, gaps) for source, found in spans.items()]

    async def _stream(self, number: int, answers: list[Answer], stop: asyncio.Event) -> None:
        """One request after the other."""
        load = self._load(f"activation/{number}")
        fields = load.fields(include_usage=True)
        while not stop.is_set():
            prompt = load.prompt(str(len(answers)))
            answers.append(await stream_answer(self._session, load.url, load.endpoint, load.models[0], prompt, fields))

    async def _activate(self, source: Source, times: int) -> list[Span]:
        (name,) = MOVED.names
        spans = []
        for _ in range(times):
            await self._server.load(MOVED, self._adapter_root)
            if source == "disk":
                await self._server.move(name, "evict")
            wanted = "on_disk" if source == "disk" else "in_host_memory"
            states = await self._server.states(name)
            if states != {wanted}:
                raise RequestFailed(f"{name} should be {wanted} before it is activated, but is {', '.join(states)}")
            await asyncio.sleep(_QUIET_S)
            begin = time.perf_counter()
            await self._server.move(name, "activate")
            spans.append((begin, time.perf_counter()))
            await asyncio.sleep(_QUIET_S)
            await self._server.unload(name)
        return spans


def summarize(source: Source, spans: Sequence[Span], gaps: Sequence[Sequence[Span]]) -> Activation:
    """Args:
    spans: the activations.
    gaps: of each stream, those between two tokens.

    Raises:
        RequestFailed: no stream was under way during an activation, or before it.
    """
    times_s = [end - begin for begin, end in spans]
    during = [ratio for begin, end in spans for ratio in _longest_ratios((begin, end), begin, gaps)]
    # A span of the same length in the quiet time before.
    quiet = [
        ratio
        for begin, end in spans
        for ratio in _longest_ratios(
            (begin - _QUIET_S / 2, begin - _QUIET_S / 2 + min(end - begin, _QUIET_S / 2)), begin, gaps
        )
    ]
    if not during or not quiet:
        raise RequestFailed("no stream had tokens before and while an adapter was activated; use longer outputs")
    return Activation(
        source,
        [seconds * 1e3 for seconds in times_s],
        statistics.median(times_s) * 1e3,
        max(times_s) * 1e3,
        (statistics.median(during), max(during)),
        (statistics.median(quiet), max(quiet)),
    )


def _longest_ratios(span: Span, activated_s: float, gaps: Sequence[Sequence[Span]]) -> list[float]:
    """Of each stream with a gap in the span: the longest one over the median of those in the quiet time before."""
    ratios = []
    for stream in gaps:
        within = [end - begin for begin, end in stream if begin < span[1] and end > span[0]]
        before = [end - begin for begin, end in stream if activated_s - _QUIET_S < end < activated_s]
        if within and before:
            ratios.append(max(within) / statistics.median(before))
    return ratios
