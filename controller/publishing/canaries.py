"""When a canary fails more than the stable version beside it. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from registry.catalog import Alias


@dataclass(slots=True)
class Outcomes:
    """Of the requests of one version: how many ended, and how many of them failed on our side."""

    num_requests: int = 0
    num_failed: int = 0

    @property
    def failed_share(self) -> float:
        return self.num_failed / self.num_requests if self.num_requests else 0.0


class CanaryJudge:
    """Counts from when a canary began, as this controller knows it; a restart begins anew.

    A canary is to be aborted when of at least `min_requests`

        failed(canary) / requests(canary) > failed(stable) / requests(stable) + margin

    Only what is our fault counts: requests that are wrong, or that clients end, are so with every version.
    """

    def __init__(self, *, margin: float, min_requests: int) -> None:
        self._margin = margin
        self._min_requests = min_requests
        self._outcomes: dict[tuple[str, str], dict[int, Outcomes]] = {}  # (release, alias) → version → its outcomes

    def begin(self, release: str, alias: str) -> None:
        """The alias has another canary, or another weight, from now on."""
        self._outcomes.pop((release, alias), None)

    def note(self, release: str, alias: str, version: int, *, failed: bool) -> None:
        outcomes = self._outcomes.setdefault((release, alias), {}).setdefault(version, Outcomes())
        outcomes.num_requests += 1
        outcomes.num_failed += failed

    def reason_to_abort(self, alias: Alias) -> str | None:
        """Why the canary of `alias` is to be aborted; None: it is not."""
        by_version = self._outcomes.get((alias.name, alias.alias), {})
        if alias.canary is None or alias.target.version is None:
            return None
        canary = by_version.get(alias.canary.version, Outcomes())
        stable = by_version.get(alias.target.version, Outcomes())
        if canary.num_requests < self._min_requests or canary.failed_share <= stable.failed_share + self._margin:
            return None
        return (
            f"{canary.num_failed} of its {canary.num_requests} requests failed, "
            f"{stable.num_failed} of {stable.num_requests} of v{alias.target.version}"
        )
