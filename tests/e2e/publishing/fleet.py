"""A controller and two workers, each with a disk of its own, and a release that clients ask for while it changes.

    publishers ──► gate ──► controller ◄── worker 0
    clients ───────────────►     ▲ ◄─ gate ◄── worker 1

The release answers as one of two fine-tunes, `sign` or `lossless`, and as nothing in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from torch import Tensor

from delta.delta_config import delta_digest
from registry.published_files import PublishedFiles
from registry.store import Store
from tests.e2e.fine_tunes import FEW_PROMPTS, FineTunes, with_norm
from tests.e2e.gate import Gate
from tests.e2e.processes import MODEL, Cluster, Process, wait_until
from tests.e2e.steady_clients import SteadyClients
from tests.fakes.stored_blobs import is_whole

RELEASE = "support"
CODECS = ("sign", "lossless")  # the first has a probe
NUM_TOKENS = 6
NUM_CLIENTS = 2
WAIT_S = 600.0  # of a machine that is busy otherwise
PART_BYTES = 4 << 20  # in the middle of the tensors of either fine-tune
VICTIM_SEQS = 2  # sequences in the batch of worker 1


class Fleet:
    """Attributes:
    answers: the exact greedy answer of each codec.
    """

    def __init__(self, cluster: Cluster, fine_tunes: FineTunes, root: Path, store: Path, caches: list[Path]) -> None:
        self.cluster = cluster
        self.fine_tunes = fine_tunes
        self.root = root
        self.store = store
        self.caches = caches
        self.gate = Gate(cluster.port)
        self.answers: dict[str, str] = {}
        self._codecs: dict[str, str] = {}  # by the digests of deltas
        self._numbers = itertools.count(1)
        self.start_controller()
        self.start_worker(0)
        self.start_worker(1)
        cluster.wait_for_workers(2)
        for number, codec in enumerate(reversed(CODECS), 1):
            self._note(codec, fine_tunes.delta(codec))
            self.publish(fine_tunes.delta(codec))
            self.wait_until_served(number)
            self.answers[codec] = self.complete(f"{RELEASE}@v{number}").json()["choices"][0]["text"]

    # ------------------------------------------------------------------------------------------------- processes

    def start_controller(self) -> None:
        """Canaries are judged by few requests, and killed workers are missed after 4 s."""
        flags = ("--heartbeat-interval", "0.5", "--missed-heartbeats", "8", "--canary-min-requests", "5")
        self.cluster.start_controller("--store", str(self.store), *flags)

    def kill_controller(self) -> None:
        assert self.cluster.controller is not None
        self.cluster.controller.kill()

    def start_worker(self, number: int, *arguments: str) -> Process:
        """Worker 1 has little room in its batch, and speaks to the controller through the gate."""
        flags = ("--controller", self.gate.url, "--max-num-seqs", str(VICTIM_SEQS)) if number == 1 else ()
        return self.cluster.start_worker(*flags, *arguments, wait=False, cache=self.caches[number], number=number)

    def kill_worker(self, number: int) -> None:
        """And wait until the controller misses it."""
        self.cluster.workers[number].kill()
        wait_until(lambda: self.cluster.num_workers() == 1, WAIT_S, "the worker gone")

    def publisher(self, delta: Path, *arguments: str) -> Process:
        return Process(
            self.root / f"{delta.name}.log", "delta", "publish", "--name", RELEASE, "--delta", str(delta),
            "--url", self.gate.url, *arguments,
        )  # fmt: skip

    def publish(self, delta: Path, *arguments: str) -> str:
        """-> what it printed"""
        status, text = self.publisher(delta, *arguments).wait()
        assert status == 0, text
        return text

    def new_delta(self, codec: str | None = None) -> tuple[str, Path]:
        """One that nobody has seen, with the answers that the release does not have now. -> its codec, its directory"""
        self.remove_old_versions()
        codec = codec or self.other_codec()
        number = next(self._numbers)

        def nudge(norm: Tensor) -> None:
            norm[number] *= 1 + 2**-7  # the smallest step of bfloat16

        delta = with_norm(self.fine_tunes.delta(codec), self.root / f"{codec}-{number}", nudge)
        self._note(codec, delta)
        return codec, delta

    def _note(self, codec: str, delta: Path) -> None:
        self._codecs[delta_digest(delta)] = codec

    # --------------------------------------------------------------------------------------------------- clients

    @contextmanager
    def clients(self, *beside: str) -> Iterator[SteadyClients]:
        """Clients of the release, who get nothing but the two answers, and what `beside` says.

        Raises:
            AssertionError: they did.
        """
        clients = SteadyClients(self.cluster.url, RELEASE, FEW_PROMPTS[0], NUM_TOKENS, self.answers)
        with clients.running(NUM_CLIENTS):
            yield clients
        others = set(clients.outcomes()) - {*CODECS, *beside}
        assert not others, others

    def complete(self, model: str = RELEASE, **more: Any) -> requests.Response:
        body = {
            "model": model, "prompt": FEW_PROMPTS[0], "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        return requests.post(f"{self.cluster.url}/v1/completions", json=body | more, timeout=300)

    # ------------------------------------------------------------------------------------------------- operators

    def admin(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """Below the release."""
        url = f"{self.cluster.url}/admin/releases/{RELEASE}{path}"
        reply = requests.request(method, url, json=body or None, timeout=60)
        assert reply.ok, reply.text
        return dict(reply.json()) if reply.content else {}

    def versions(self) -> dict[int, dict[str, Any]]:
        return {version["number"]: version for version in self.admin("GET", "")["versions"]}

    def alias(self) -> dict[str, Any]:
        (alias,) = self.admin("GET", "")["aliases"]
        return dict(alias)

    @property
    def serving(self) -> str:
        """The codec whose answers the release has now."""
        return self._codecs[self.versions()[self.current()]["digest"]]

    def current(self) -> int:
        """The version that the alias points to."""
        return int(self.alias()["version"])

    def remove_old_versions(self) -> None:
        """Workers that are started again then have little to read."""
        for number in self.versions().keys() - {1, 2, self.current()}:
            self.admin("DELETE", f"/versions/{number}")

    def other_codec(self) -> str:
        return next(codec for codec in CODECS if codec != self.serving)

    def other_version(self) -> int:
        """The one with the answers that the release does not have now."""
        return {"lossless": 1, "sign": 2}[self.other_codec()]

    def evict(self, version: int) -> None:
        """Let all workers read it again when it is asked for."""
        reply = requests.post(f"{self.cluster.url}/admin/variants/{RELEASE}@v{version}/evict", timeout=60)
        assert reply.ok, reply.text

    def on_workers(self, version: int) -> list[dict[str, Any]]:
        return list(self.admin("GET", f"/versions/{version}")["workers"])

    def wait_until_served(self, version: int, count: int = 2) -> None:
        def served() -> bool:
            return sum(worker["usable"] for worker in self.on_workers(version)) == count

        wait_until(served, WAIT_S, f"v{version} on {count} workers")

    # ---------------------------------------------------------------------------------------------------- stores

    def cached(self, number: int) -> set[str]:
        """Digests of the versions whose files a worker keeps."""
        directories = (self.caches[number] / "rootgraft" / "variants").iterdir()
        return {f"sha256:{directory.name}" for directory in directories if not directory.name.startswith(".")}

    def wait_until_clean(self, number: int) -> None:
        """Until a worker keeps the files of the versions that there are, and no others."""
        versions = [version["files"] for version in self.versions().values()]
        needed = {PublishedFiles(files).manifest_digest for files in versions}
        blobs = {digest for files in versions for digest in files.values()}
        store = Store(self.caches[number] / "rootgraft" / "store")

        def clean() -> bool:
            return self.cached(number) == needed and {blob.digest for blob in store.blobs()} <= blobs

        wait_until(clean, WAIT_S, f"a clean disk of worker {number}")

    def check_stores(self) -> None:
        """What is in them is what it says, and nothing is half-written."""
        for root in (self.store, *(cache / "rootgraft" / "store" for cache in self.caches)):
            store = Store(root)
            for blob in store.blobs():
                assert is_whole(blob)
            assert not list((root / "blobs" / "sha256").glob(".tmp-*"))

    def generate_for_long(self, worker_port: int) -> requests.Response:
        """A request of the base, past the controller, that takes longer than a test. -> its answer, as it begins"""
        body = {
            "request_id": "long", "model": MODEL, "prompt": {"kind": "text", "text": FEW_PROMPTS[1]},
            "sampling": {"max_tokens": 8000, "ignore_eos": True},
        }  # fmt: skip
        return requests.post(f"http://127.0.0.1:{worker_port}/internal/generate", json=body, stream=True, timeout=300)
