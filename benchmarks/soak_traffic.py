"""The traffic of the LoRA soak: clients that ask, operators that change adapters, and one who adds bad ones."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from soak_adapters import VERSIONS, point_to, version_path
from soak_checks import Change, Content, History, Reply, Request, Token, fault

MODEL = "base"
MAX_TOKENS = 8
TIMEOUT_S = 300.0  # for any one request; a machine that others use too is slow
_BEGINNING = (
    "You are a careful clerk. Answer in short sentences, never invent figures, and name your sources. Question: "
)
PROMPTS = (_BEGINNING + "what is a hash table?", _BEGINNING + "why is the sky blue?")
SCALES = (1.0, 0.5)
MAX_VIOLATIONS = 50  # printed, and written down


@dataclass(slots=True)
class Soak:
    """What all parts of a run share.

    Attributes:
        histories: by name, also of names that never exist.
        expected: the recorded tokens, by content and prompt.
        combinations: the pairs of names that are combined.
    """

    session: aiohttp.ClientSession
    url: str
    root: Path
    seed: int
    names: list[str]
    combinations: list[tuple[str, str]]
    bad_paths: list[str]
    most_pins: int
    histories: dict[str, History] = field(default_factory=dict)
    locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    expected: dict[tuple[Content, int], list[Token]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    num_certain: int = 0  # greedy answers for which only one version was possible

    def __post_init__(self) -> None:
        for name in [*self.names, *_strangers(self)]:
            self.histories[name] = History()
            self.locks[name] = asyncio.Lock()

    def violate(self, text: str) -> None:
        self.violations.append(text)
        if len(self.violations) <= MAX_VIOLATIONS:
            print(f"VIOLATION {text}", flush=True)


def _strangers(soak: Soak) -> list[str]:
    """Names that are never there: some that nobody adds, and those under which bad adapters are tried."""
    return ["never-added", *(f"bad-{number}" for number in range(len(soak.bad_paths)))]


# ------------------------------------------------------------------------------------------------ requests


def draw_request(soak: Soak, number: int) -> Request:
    """The request of a number: adapters by Zipf's law, a tenth for the base, a tenth for combinations."""
    rng = random.Random(f"{soak.seed}/request/{number}")
    kind = rng.random()
    prompt = rng.randrange(len(PROMPTS))
    loras: tuple[tuple[str, float], ...]
    if kind < 0.1:
        loras = ()
    elif kind < 0.2 and soak.combinations:
        loras, prompt = tuple(zip(rng.choice(soak.combinations), SCALES, strict=True)), 0
    elif kind < 0.22:
        loras = ((rng.choice(_strangers(soak)), 1.0),)
    else:
        weights = [1 / (place + 1) for place in range(len(soak.names))]
        loras = ((rng.choices(soak.names, weights)[0], 1.0),)
    return Request(
        loras=loras,
        prompt=prompt,
        num_tokens=rng.randint(1, MAX_TOKENS),
        stream=rng.random() < 0.4,
        seed=rng.randrange(1000) if rng.random() < 0.15 else None,
        leaves=rng.choice(("at once", "at the first token")) if rng.random() < 0.08 else None,
    )


async def send(soak: Soak, request: Request) -> Reply:
    """Send a request and read what comes; whatever happens is in the reply."""
    reply = Reply(sent_s=time.monotonic())
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": PROMPTS[request.prompt],
        "max_tokens": request.num_tokens,
        "temperature": 0 if request.seed is None else 1,
        "logprobs": 0,
        "ignore_eos": True,
        "stream": request.stream,
    }
    if request.seed is not None:
        body["seed"] = request.seed
    if len(request.loras) == 1 and request.loras[0][1] == 1.0:
        body["model"] = request.loras[0][0]
    elif request.loras:
        body["loras"] = [{"name": name, "scale": scale} for name, scale in request.loras]
    timeout = aiohttp.ClientTimeout(total=0.05 if request.leaves == "at once" else TIMEOUT_S)
    try:
        async with soak.session.post(f"{soak.url}/v1/completions", json=body, timeout=timeout) as response:
            reply.answered_s, reply.status = time.monotonic(), response.status
            if response.status != 200:
                reply.error = _message(await response.text())
            elif request.stream:
                await _read_stream(response, reply, leave=request.leaves is not None)
            else:
                _take(reply, await response.json())
                reply.complete = True
    except TimeoutError:
        if request.leaves is None:
            reply.error = "timed out"
    except aiohttp.ClientError as error:
        reply.error = f"{type(error).__name__}: {error}"
    return reply


async def _read_stream(response: aiohttp.ClientResponse, reply: Reply, *, leave: bool) -> None:
    async for line in response.content:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            reply.complete = True
        elif data:
            chunk = json.loads(data)
            if "error" in chunk:
                reply.error = _message(data)
                return
            _take(reply, chunk)
            if leave:
                return


def _take(reply: Reply, chunk: dict[str, Any]) -> None:
    for choice in chunk["choices"]:
        logprobs = choice.get("logprobs") or {"tokens": [], "token_logprobs": []}
        reply.tokens += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)


def _message(content: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(content)["error"]["message"])
    return content[:300]


async def client(soak: Soak, todo: list[int]) -> None:
    """Send requests one after the other until no number is left of `todo`."""
    while todo:
        request = draw_request(soak, todo.pop())
        reply = await send(soak, request)
        wrong = fault(request, reply, soak.histories, soak.expected)
        if wrong is not None:
            soak.violate(f"{request}: {wrong}")
            soak.outcomes["wrong"] += 1
            continue
        if reply.complete:
            soak.latencies_s.append(time.monotonic() - reply.sent_s)
            versions = [soak.histories[name].possible(reply.sent_s, reply.answered_s) for name, _ in request.loras]
            soak.num_certain += request.seed is None and all(len(possible) == 1 for possible in versions)
        soak.outcomes[str(reply.status) if reply.complete or reply.error else "client left"] += 1


# ------------------------------------------------------------------------------------------------ operations


async def call(soak: Soak, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """-> status and text of the answer; (0, reason) when there is none."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with soak.session.request(method, soak.url + path, json=body, timeout=timeout) as response:
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return 0, f"{type(error).__name__}: {error}"


async def operate(soak: Soak, verb: str, name: str, path: str, body: dict[str, Any], *allowed: int) -> int:
    """One operation, which has to end with one of the statuses `allowed`."""
    status, text = await call(soak, "POST", path, body)
    soak.operations[f"{verb} {status}"] += 1
    if status not in allowed:
        soak.violate(f"{verb} {name} {body}: {status} {text[:300]}")
    return status


async def load(soak: Soak, name: str, version: str, *, linked: bool = False) -> None:
    """Load a version, in place of the other one if that is there. The caller holds the name's lock.

    Args:
        linked: by the path that is the same for both versions.
    """
    if linked:
        point_to(soak.root, name, version)
    change = Change(time.monotonic(), version)
    verb = "load" if soak.histories[name].version is None else "replace"
    soak.histories[name].changes.append(change)
    path = name if linked else version_path(name, version)
    body = {"lora_name": name, "lora_path": path, "load_inplace": verb == "replace"}
    await operate(soak, verb, name, "/v1/load_lora_adapter", body, 200)
    change.ended_s = time.monotonic()
    soak.pinned.discard(name)


async def unload(soak: Soak, name: str) -> None:
    """The caller holds the name's lock."""
    change = Change(time.monotonic(), None)
    soak.histories[name].changes.append(change)
    await operate(soak, "unload", name, "/v1/unload_lora_adapter", {"lora_name": name}, 200)
    change.ended_s = time.monotonic()
    soak.pinned.discard(name)


async def operator(soak: Soak, rng: random.Random, done: asyncio.Event) -> None:
    """Change one adapter after the other."""
    while not done.is_set():
        name = rng.choice(soak.names)
        draw = rng.random(), rng.random() < 0.5
        async with soak.locks[name]:
            await change_at_random(soak, name, *draw)
        await asyncio.sleep(rng.random() * 0.2)


async def change_at_random(soak: Soak, name: str, draw: float, linked: bool) -> None:
    """The caller holds the name's lock.

    Args:
        draw: 0 to 1, chooses the change.
        linked: as for `load`.
    """
    version = soak.histories[name].version
    admin = f"/admin/variants/{name}"
    if version is None:
        if draw < 0.1:
            await operate(soak, "unload twice", name, "/v1/unload_lora_adapter", {"lora_name": name}, 404)
        else:
            await load(soak, name, VERSIONS[linked], linked=draw < 0.5)
    elif draw < 0.2:
        await unload(soak, name)
    elif draw < 0.45:
        await load(soak, name, _other(version), linked=linked)
    elif draw < 0.5:
        await load(soak, name, version, linked=linked)
    elif draw < 0.55:
        body = {"lora_name": name, "lora_path": version_path(name, _other(version))}
        await operate(soak, "load twice", name, "/v1/load_lora_adapter", body, 400)
    elif draw < 0.7:
        if name in soak.pinned or len(soak.pinned) >= soak.most_pins:
            await operate(soak, "unpin", name, f"{admin}/unpin", {}, 200)
            soak.pinned.discard(name)
        else:
            soak.pinned.add(name)
            await operate(soak, "pin", name, f"{admin}/pin", {}, 200)
    elif draw < 0.85:
        await operate(soak, "activate", name, f"{admin}/activate", {}, 200)
    else:
        await operate(soak, "evict", name, f"{admin}/evict", {}, 200, 400)  # 400: it is needed


def _other(version: str) -> str:
    return VERSIONS[1 - VERSIONS.index(version)]


async def spoiler(soak: Soak, rng: random.Random, done: asyncio.Event) -> None:
    """Add bad adapters, half of them in place of a good one, which has to stay."""
    while not done.is_set():
        number = rng.randrange(len(soak.bad_paths))
        name = rng.choice(soak.names) if rng.random() < 0.5 else f"bad-{number}"
        async with soak.locks[name]:
            attempt = Change(time.monotonic(), soak.histories[name].version)
            soak.histories[name].changes.append(attempt)
            body = {"lora_name": name, "lora_path": soak.bad_paths[number], "load_inplace": True}
            await operate(soak, "load bad", name, "/v1/load_lora_adapter", body, 400, 403)
            attempt.ended_s = time.monotonic()
        await asyncio.sleep(rng.random() * 0.3)
