"""Where requests for variants go: the controller's own routing on simulated workers. Deterministic; no model, no clock.

    python benchmarks/variant_routing.py --json benchmarks/results/2026-11-21-variant-routing.json

Requests arrive at random (Poisson), each for one of `--num-variants` variants (Zipf) with one of `--num-prefixes`
prefixes, at `--utilisation` of what the workers could do at full speed. A worker runs `--num-slots` requests at once,
each for a random time (exponential, mean `--service-s`, and longer by `--slowdown` times the share of the slots that
are taken when it begins), and takes the others in the order of their arrival. It has `--max-active` variants ready and
`--max-host` in host memory, and evicts those that were used longest ago; a variant that is not ready makes its request
wait for ACTIVATE_S or LOAD_S. The controller learns of that in heartbeats, once a second, as it does in life.

    variant       VariantRouting over LeastLoad, as the controller uses it
    affinity      LeastLoad with variant and prefix as the affinity
    least load    LeastLoad without affinity

The results say how many requests found their variant ready, in host memory or on disk, the seconds from arrival to
end, those lost to bringing variants, how unevenly the workers are used, and on how many of them the hottest variant
ran.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from controller.protocol import VariantState, VariantStatus, WorkerStats
from controller.routing import LeastLoad, VariantRouting
from controller.workers import Worker

ACTIVATE_S, LOAD_S = 0.02, 0.2  # from host memory, from disk; the targets of the engine
HEARTBEAT_S = 1.0

Choose = Callable[[Sequence[Worker], str, str], Worker]
"""(workers, variant, prefix) -> the one that gets the request"""


@dataclass(frozen=True, slots=True)
class Scenario:
    num_workers: int = 4
    num_slots: int = 16
    max_active: int = 16
    max_host: int = 32
    num_variants: int = 200
    zipf: float = 1.0
    num_prefixes: int = 64
    num_requests: int = 20_000
    service_s: float = 1.0
    slowdown: float = 1.0
    utilisation: float = 0.4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    routing: str
    ready: float  # shares of the requests
    in_host_memory: float
    on_disk: float
    mean_s: float
    p99_s: float
    lost_s_per_request: float
    busiest_over_mean: float  # requests of the busiest worker
    workers_of_hottest: int


@dataclass(frozen=True, slots=True)
class Request:
    arrival_s: float
    variant: str
    prefix: str
    service_s: float


class SimulatedWorker:
    """`worker` is what the controller knows; the rest is how it is."""

    def __init__(self, worker_id: str, scenario: Scenario, variants: Sequence[str]) -> None:
        self.worker = Worker(worker_id, f"http://{worker_id}", (), WorkerStats(kv_blocks_total=1), 0.0)
        self.tiers: Counter[VariantState] = Counter()
        self.lost_s = 0.0
        self.num_requests_of: Counter[str] = Counter()
        self._scenario = scenario
        self._queue: deque[Request] = deque()
        self._running: Counter[str] = Counter()
        self._active: OrderedDict[str, None] = OrderedDict()  # used longest ago first
        self._host: OrderedDict[str, None] = OrderedDict()
        self._told: dict[str, VariantState] = dict.fromkeys(variants, "on_disk")
        for name in variants:
            self._tell(name, "on_disk")

    def add(self, request: Request) -> None:
        self.worker.num_in_flight += 1
        self.num_requests_of[request.variant] += 1
        self._queue.append(request)

    def start(self) -> list[tuple[float, Request]]:
        """Begin what can begin. -> (seconds until its end, request)"""
        begun: list[tuple[float, Request]] = []
        waiting: deque[Request] = deque()
        while self._queue and self._running.total() < self._scenario.num_slots:
            request = self._queue.popleft()
            if self._make_room(request.variant):
                delay_s = self._bring(request.variant)
                slower = 1.0 + self._scenario.slowdown * self._running.total() / self._scenario.num_slots
                self._running[request.variant] += 1
                begun.append((delay_s + request.service_s * slower, request))
            else:
                waiting.append(request)  # all that is ready is in use
        self._queue.extendleft(reversed(waiting))
        return begun

    def end(self, request: Request) -> None:
        self.worker.num_in_flight -= 1
        self._running[request.variant] -= 1
        if not self._running[request.variant]:
            del self._running[request.variant]

    def heartbeat(self) -> None:
        self.worker.num_in_flight_at_heartbeat = self.worker.num_in_flight
        running = self._running.total()
        self.worker.stats = WorkerStats(num_running=running, num_waiting=len(self._queue), kv_blocks_total=1)
        for name, told in list(self._told.items()):
            if (state := self._state(name)) != told:
                self._tell(name, state)

    def _tell(self, name: str, state: VariantState) -> None:
        self._told[name] = state
        self.worker.variants[name] = VariantStatus(name=name, parent="m", path=name, state=state)

    def _state(self, name: str) -> VariantState:
        return "active" if name in self._active else "in_host_memory" if name in self._host else "on_disk"

    def _make_room(self, name: str) -> bool:
        if name in self._active or len(self._active) < self._scenario.max_active:
            return True
        unused = next((other for other in self._active if other not in self._running), None)
        if unused is None:
            return False
        del self._active[unused]
        return True

    def _bring(self, name: str) -> float:
        state = self._state(name)
        self.tiers[state] += 1
        for memory in (self._active, self._host):
            memory[name] = None
            memory.move_to_end(name)
        if len(self._host) > self._scenario.max_host:
            self._host.popitem(last=False)
        delay_s = {"active": 0.0, "in_host_memory": ACTIVATE_S, "on_disk": LOAD_S}[state]
        self.lost_s += delay_s
        return delay_s


def requests(scenario: Scenario) -> list[Request]:
    """The trace, the same for every routing."""
    rng = random.Random(scenario.seed)
    names = variant_names(scenario)
    weights = [1.0 / (rank + 1) ** scenario.zipf for rank in range(len(names))]
    rate = scenario.utilisation * scenario.num_workers * scenario.num_slots / scenario.service_s
    arrivals = itertools.accumulate(rng.expovariate(rate) for _ in range(scenario.num_requests))
    return [
        Request(at, name, f"prefix-{rng.randrange(scenario.num_prefixes)}", rng.expovariate(1.0 / scenario.service_s))
        for at, name in zip(arrivals, rng.choices(names, weights, k=scenario.num_requests), strict=True)
    ]


def variant_names(scenario: Scenario) -> list[str]:
    """Most popular first."""
    return [f"variant-{rank}" for rank in range(scenario.num_variants)]


def simulate(scenario: Scenario, routing: str) -> Result:
    names = variant_names(scenario)
    fleet = {f"w{i}": SimulatedWorker(f"w{i}", scenario, names) for i in range(scenario.num_workers)}
    choose = _routing(routing, random.Random(scenario.seed))
    candidates = [simulated.worker for simulated in fleet.values()]
    ends: list[tuple[float, int, str, Request]] = []  # (time, tie breaker, worker id, request)
    ties = itertools.count()
    latencies_s: list[float] = []
    heartbeat_s = 0.0

    def begin(simulated: SimulatedWorker, now: float) -> None:
        for after_s, request in simulated.start():
            heapq.heappush(ends, (now + after_s, next(ties), simulated.worker.worker_id, request))

    def run_until(time_s: float) -> None:
        while ends and ends[0][0] <= time_s:
            now, _, worker_id, request = heapq.heappop(ends)
            latencies_s.append(now - request.arrival_s)
            fleet[worker_id].end(request)
            begin(fleet[worker_id], now)

    for request in requests(scenario):
        while heartbeat_s <= request.arrival_s:
            run_until(heartbeat_s)
            for simulated in fleet.values():
                simulated.heartbeat()
            heartbeat_s += HEARTBEAT_S
        run_until(request.arrival_s)
        chosen = fleet[choose(candidates, request.variant, request.prefix).worker_id]
        chosen.add(request)
        begin(chosen, request.arrival_s)
    run_until(float("inf"))
    return _result(routing, scenario, list(fleet.values()), latencies_s)


def _routing(name: str, rng: random.Random) -> Choose:
    policy = LeastLoad(rng)
    choices: dict[str, Choose] = {
        "variant": lambda workers, variant, prefix: VariantRouting(policy)(workers, [variant], prefix),
        "affinity": lambda workers, variant, prefix: policy(workers, f"{variant}\0{prefix}"),
        "least load": lambda workers, variant, prefix: policy(workers, None),
    }
    return choices[name]


def _result(routing: str, scenario: Scenario, fleet: Sequence[SimulatedWorker], latencies_s: Sequence[float]) -> Result:
    num = len(latencies_s)
    assert num == scenario.num_requests, "a request got lost"
    tiers: Counter[VariantState] = sum((simulated.tiers for simulated in fleet), Counter())
    shares = [simulated.num_requests_of.total() for simulated in fleet]
    hottest = variant_names(scenario)[0]
    return Result(
        routing=routing,
        ready=round(tiers["active"] / num, 4),
        in_host_memory=round(tiers["in_host_memory"] / num, 4),
        on_disk=round(tiers["on_disk"] / num, 4),
        mean_s=round(statistics.fmean(latencies_s), 4),
        p99_s=round(sorted(latencies_s)[int(0.99 * num)], 4),
        lost_s_per_request=round(sum(simulated.lost_s for simulated in fleet) / num, 5),
        busiest_over_mean=round(max(shares) / statistics.fmean(shares), 3),
        workers_of_hottest=sum(simulated.num_requests_of[hottest] > 0 for simulated in fleet),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Scenario()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--json", type=Path, help="write the results here, for Zipf exponents 0.8, 1.0 and 1.5")
    args = vars(parser.parse_args())
    path: Path | None = args.pop("json")
    given = Scenario(**args)
    exponents = [given.zipf] if path is None else [0.8, 1.0, 1.5]
    report = []
    for zipf in exponents:
        scenario = Scenario(**{**asdict(given), "zipf": zipf})
        results = [asdict(simulate(scenario, routing)) for routing in ("variant", "affinity", "least load")]
        report.append({"scenario": asdict(scenario), "results": results})
        print(f"Zipf {zipf}")
        for result in results:
            print("   ", "  ".join(f"{key} {value}" for key, value in result.items()))
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
