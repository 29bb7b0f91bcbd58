"""What was counted of each version of a release, as Prometheus metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from controller.publishing.release_directory import ReleaseDirectory

Role = Literal["stable", "canary", "shadow"]
Outcome = Literal["ok", "refused", "failed", "cancelled"]
Comparison = Literal["agrees", "differs", "sampled", "failed", "skipped"]


class ReleaseCounts(Collector):
    """Counts since this controller started.

    Attributes:
        requests: by (release, version, role, outcome). refused: the client's fault; failed: ours.
        tokens: sampled, by (release, version, role).
        shadows: by (release, version, comparison) with the answer that the client got. sampled: the request was one
            whose answers differ by chance; skipped: too many were being compared.
    """

    def __init__(self, directory: ReleaseDirectory) -> None:
        self._directory = directory
        self.requests: Counter[tuple[str, int, Role, Outcome]] = Counter()
        self.tokens: Counter[tuple[str, int, Role]] = Counter()
        self.shadows: Counter[tuple[str, int, Comparison]] = Counter()

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "rootgraft_release_requests",
            "Requests of a version that ended.",
            labels=("release", "version", "role", "outcome"),
        )
        for (release, version, role, outcome), count in self.requests.items():
            requests.add_metric((release, f"v{version}", role, outcome), count)
        yield requests
        tokens = CounterMetricFamily(
            "rootgraft_release_tokens", "Tokens sampled with a version.", labels=("release", "version", "role")
        )
        for (release, version, role), count in self.tokens.items():
            tokens.add_metric((release, f"v{version}", role), count)
        yield tokens
        shadows = CounterMetricFamily(
            "rootgraft_release_shadow_answers",
            "Answers of shadows, compared with those that clients got.",
            labels=("release", "version", "comparison"),
        )
        for (release, version, comparison), count in self.shadows.items():
            shadows.add_metric((release, f"v{version}", comparison), count)
        yield shadows
        yield self._weights()

    def _weights(self) -> Metric:
        weights = GaugeMetricFamily(
            "rootgraft_release_weight", "Share of an alias's requests.", labels=("release", "alias", "version", "role")
        )
        for alias in self._directory.aliases():
            if alias.target.version is None:
                continue
            share = 0.0 if alias.canary is None else alias.canary.weight
            weights.add_metric((alias.name, alias.alias, f"v{alias.target.version}", "stable"), 1.0 - share)
            if alias.canary is not None:
                weights.add_metric((alias.name, alias.alias, f"v{alias.canary.version}", "canary"), share)
        return weights
