"""LoRA adapters come, go, change and are asked for, all at random, for thousands of requests; then nothing may be left.

    python benchmarks/lora_soak.py --model-path DIR --num-adapters 200 --num-requests 5000 --json PATH

Starts a controller and a worker and makes two versions of every adapter. First the greedy answers of each version, of
some combinations and of the base are recorded, and everything is unloaded: the memory that the worker has then is the
measure. In the soak itself clients send short requests (for adapters, combinations, the base; whole or streamed; greedy
or sampled; some clients go away), operators load, unload, replace, pin, unpin, activate and evict, and one keeps adding
adapters that have to be refused. It fails, with status 1 and the violations in the JSON, unless

- every request has exactly one outcome that is right for what its adapter was then (soak_checks.py), and every greedy
  answer is, in tokens and log-probabilities, the recorded one of the version that the request was admitted with;
- every operation succeeds, or is refused where it has to be;
- in the end, everything unloaded, the worker holds no request, KV block, adapter or byte of one, its memory is that of
  the beginning, but for --memory-bound-mib, it answers as before, and no log holds an error.

The seed decides what is asked and done, though not how it is interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from arguments import new_file
from openai_client import RequestFailed
from processes import LOG_NAME, free_ports, ready, started
from random_adapters import ranks
from report import describe_run, now, write_report
from serve import percentiles
from soak_adapters import VERSIONS, make_bad_adapters, make_good_adapters
from soak_checks import Content, Request, same_tokens
from soak_traffic import (
    MAX_TOKENS,
    MAX_VIOLATIONS,
    MODEL,
    PROMPTS,
    SCALES,
    Soak,
    client,
    load,
    operator,
    send,
    spoiler,
    unload,
)

_LOGGED_ERROR = re.compile(r"Traceback|AssertionError| (ERROR|CRITICAL) ")

# ------------------------------------------------------------------------------------------------ recording


async def record(soak: Soak, num_at_once: int) -> None:
    """The greedy answers of the base and of all versions, and of all versions of the combinations."""
    await _ask(soak, (), range(len(PROMPTS)))

    async def of_version(name: str, version: str) -> None:
        async with soak.locks[name]:
            await load(soak, name, version)
            await _ask(soak, ((name, version, 1.0),), range(len(PROMPTS)))
            await unload(soak, name)

    async def of_combination(names: tuple[str, str]) -> None:
        for versions in product(VERSIONS, repeat=len(names)):
            async with soak.locks[names[0]], soak.locks[names[1]]:
                for name, version in zip(names, versions, strict=True):
                    await load(soak, name, version)
                await _ask(soak, tuple(zip(names, versions, SCALES, strict=True)), [0])
                for name in names:
                    await unload(soak, name)

    await _all(num_at_once, [(of_version, (name, version)) for name in soak.names for version in VERSIONS])
    await _all(1, [(of_combination, (names,)) for names in soak.combinations])


async def _ask(soak: Soak, content: Content, prompts: Sequence[int]) -> None:
    loras = tuple((name, scale) for name, _, scale in content)
    replies = await asyncio.gather(*(send(soak, Request(loras, prompt, MAX_TOKENS)) for prompt in prompts))
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.status != 200 or len(reply.tokens) != MAX_TOKENS:
            raise RequestFailed(f"{content} cannot be recorded: {reply}")
        soak.expected[content, prompt] = reply.tokens


async def _all(num_at_once: int, jobs: Sequence[tuple[Callable[..., Awaitable[None]], tuple[Any, ...]]]) -> None:
    """Do all of it, in this order, so much at once."""
    left = iter(jobs)

    async def work() -> None:
        for function, arguments in left:
            await function(*arguments)

    await asyncio.gather(*(work() for _ in range(num_at_once)))


# ------------------------------------------------------------------------------------------------ the run


async def unload_all(soak: Soak) -> None:
    async def of_name(name: str) -> None:
        async with soak.locks[name]:
            if soak.histories[name].version is not None:
                await unload(soak, name)

    await _all(4, [(of_name, (name,)) for name in soak.names])


async def idle_worker(soak: Soak, worker_url: str) -> dict[str, Any]:
    """What the worker still holds once nothing is asked of it; waited for until it is nothing."""
    held: dict[str, Any] = {}
    for _ in range(100):
        async with soak.session.get(worker_url + "/internal/stats") as response:
            stats = await response.json()
        async with soak.session.get(worker_url + "/internal/variants") as response:
            variants = (await response.json())["variants"]
        held = {key: stats[key] for key in ("num_running", "num_waiting", "kv_blocks_used", "kv_host_blocks_used")}
        held["variants"] = [variant["name"] for variant in variants]
        if not any(held.values()):
            break
        await asyncio.sleep(0.1)
    return held


async def load_all(soak: Soak) -> None:
    async def of_name(name: str) -> None:
        async with soak.locks[name]:
            await load(soak, name, VERSIONS[0])

    await _all(4, [(of_name, (name,)) for name in soak.names])


async def soak_requests(soak: Soak, options: argparse.Namespace) -> None:
    """Everything at once, until all requests have been sent and answered."""
    await load_all(soak)
    todo = list(reversed(range(options.num_requests)))
    done = asyncio.Event()
    others = [
        operator(soak, random.Random(f"{soak.seed}/operator/{number}"), done) for number in range(options.operators)
    ]
    others.append(spoiler(soak, random.Random(f"{soak.seed}/spoiler"), done))
    tasks = [asyncio.create_task(other) for other in others]
    progress = asyncio.create_task(_show(todo))
    try:
        await asyncio.gather(*(client(soak, todo) for _ in range(options.clients)))
    finally:
        done.set()
        progress.cancel()
    await asyncio.gather(*tasks)


async def _show(todo: Sequence[int]) -> None:
    for minute in count():
        print(f"{minute} min: {len(todo)} requests left", flush=True)
        await asyncio.sleep(60)


def check_logs(soak: Soak, log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines():
        if _LOGGED_ERROR.search(line):
            soak.violate(f"logged: {line}")


async def check_end(soak: Soak, worker_url: str) -> None:
    """Everything is unloaded: nothing is held or served but the base, and that as before."""
    held = await idle_worker(soak, worker_url)
    if any(held.values()):
        soak.violate(f"still held: {held}")
    async with soak.session.get(soak.url + "/v1/models") as response:
        served = [model["id"] for model in (await response.json())["data"]]
    async with soak.session.get(soak.url + "/admin/variants") as response:
        wanted = [variant["name"] for variant in (await response.json())["variants"]]
    if served != [MODEL] or wanted:
        soak.violate(f"still served: {served}, {wanted}")
    for prompt in range(len(PROMPTS)):
        reply = await send(soak, Request((), prompt, MAX_TOKENS))
        if not same_tokens(reply.tokens, soak.expected[(), prompt]):
            soak.violate(f"the base answers otherwise than before: {reply}")
    reply = await send(soak, Request(((soak.names[0], 1.0),), 0, MAX_TOKENS))
    if reply.status != 404:
        soak.violate(f"{soak.names[0]} is unloaded, but answers: {reply}")


async def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The whole run. -> the report's fields

    Raises:
        RequestFailed: a process does not start, or what is right cannot be recorded; the log is in `directory`.
    """
    root = directory / "root"
    names = make_good_adapters(root, options.model_path, options.ranks, options.num_adapters, seed=options.seed)
    bad_paths = make_bad_adapters(root, options.model_path, seed=options.seed)
    port, worker_port = free_ports(2)
    url, worker_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{worker_port}"
    log = directory / LOG_NAME
    database = f"sqlite:///{directory / 'catalog.sqlite3'}"
    pairs = random.Random(f"{options.seed}/pairs")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        soak = Soak(
            session=session,
            url=url,
            root=root,
            seed=options.seed,
            names=names,
            combinations=[_pair(pairs.sample(names, 2)) for _ in range(options.combinations)],
            bad_paths=bad_paths,
            most_pins=max(1, options.max_loras // 4),
        )
        with (
            started(log, "-m", "controller", "--port", str(port), "--database", database) as controller,
            started(log, *_worker_command(options, root, worker_port, url)) as worker,
        ):
            await ready(session, url, 1, [controller, worker])
            memory = psutil.Process(worker.pid).memory_info
            print("recording", flush=True)
            await record(soak, options.record_at_once)
            await idle_worker(soak, worker_url)
            before_mib = memory().rss / 2**20
            recorded, soak.operations = dict(soak.operations), type(soak.operations)()
            print(f"soaking; the worker has {before_mib:.0f} MiB", flush=True)
            await soak_requests(soak, options)
            loaded_mib = memory().rss / 2**20
            async with session.get(worker_url + "/internal/variants") as response:
                variants = (await response.json())["variants"]
            await unload_all(soak)
            await check_end(soak, worker_url)
            after_mib = memory().rss / 2**20
            if after_mib > before_mib + options.memory_bound_mib:
                soak.violate(f"the worker has {after_mib:.0f} MiB, {after_mib - before_mib:.0f} more than before")
            if worker.poll() is not None or controller.poll() is not None:
                soak.violate("a process has ended")
        check_logs(soak, log)
    latency = percentiles(soak.latencies_s)
    held = sum(variant["host_bytes"] + variant["active_bytes"] for variant in variants)
    return {
        "recorded": recorded,
        "num_recorded_answers": len(soak.expected),
        "num_different_answers": len({tuple(answer) for answer in soak.expected.values()}),
        "requests": dict(sorted(soak.outcomes.items())),
        "num_greedy_answers_of_one_possible_version": soak.num_certain,
        "operations": dict(sorted(soak.operations.items())),
        "latency_p50_s": None if latency is None else latency.p50,
        "latency_p99_s": None if latency is None else latency.p99,
        "loads_of_the_last_adapters": sum(variant["loads_total"] for variant in variants),
        "evictions_of_the_last_adapters": sum(variant["evictions_total"] for variant in variants),
        "worker_memory_mib": {
            "before": before_mib, "loaded": loaded_mib, "after": after_mib, "of_adapters_when_loaded": held / 2**20
        },
        "num_violations": len(soak.violations),
        "violations": soak.violations[:MAX_VIOLATIONS],
    }  # fmt: skip


def _worker_command(options: argparse.Namespace, root: Path, port: int, controller: str) -> tuple[str, ...]:
    return (
        "-m", "model_worker", "--model-path", str(options.model_path), "--model-name", MODEL, "--dtype", "bfloat16",
        "--port", str(port), "--controller", controller, "--adapter-root", str(root), "--num-blocks", "192",
        "--lora-patience", "0.2",
        "--max-loras", str(options.max_loras), "--max-cpu-loras", str(options.max_cpu_loras),
        "--lora-memory-gib", str(options.lora_memory_gib),
    )  # fmt: skip


def _pair(names: Sequence[str]) -> tuple[str, str]:
    first, second = names
    return first, second


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lora_soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, type=Path, metavar="DIR", help="its safetensors directory")
    parser.add_argument("--num-adapters", type=int, default=200)
    parser.add_argument("--ranks", type=ranks, default=(1, 2, 4, 8, 16), help="taken in turn (default: 1,2,4,8,16)")
    parser.add_argument("--combinations", type=int, default=10, help="pairs of adapters (default: %(default)s)")
    parser.add_argument("--num-requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--operators", type=int, default=3)
    parser.add_argument("--record-at-once", type=int, default=16, help="adapters (default: %(default)s)")
    parser.add_argument("--max-loras", type=int, default=24, help="of the worker (default: %(default)s)")
    parser.add_argument("--max-cpu-loras", type=int, default=48, help="of the worker (default: %(default)s)")
    parser.add_argument("--lora-memory-gib", type=float, default=0.5, help="of the worker (default: %(default)s)")
    parser.add_argument(
        "--memory-bound-mib",
        type=float,
        default=64.0,
        help="by how much the worker's memory may have grown in the end (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file, help="file for machine and results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    started_at = now()
    with tempfile.TemporaryDirectory(prefix="lora-soak-") as name:
        try:
            found = asyncio.run(run(options, Path(name)))
        except RequestFailed as error:
            log = (Path(name) / LOG_NAME).read_text(errors="replace")
            print(f"lora_soak.py: {error}\n{log[-4000:]}", file=sys.stderr)
            return 1
    report = {**describe_run("lora_soak.py", arguments, started_at), **found}
    print(json.dumps(report, indent=2))
    if options.json is not None:
        write_report(report, options.json)
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
