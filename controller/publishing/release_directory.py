"""The releases as they were read from the catalog last, and which version a request for one gets. Pure Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from registry.catalog import DEFAULT_ALIAS, Alias, Release, VersionRecord
from registry.errors import InvalidRequestError
from registry.names import ModelName, parse_name


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a public name of a release stands for. Versions are given by number.

    Attributes:
        alias: through which it does; None: the name says the version itself.
        canary_weight: share of the requests, 0 to 1, that `canary` gets.
    """

    release: str
    stable: int
    alias: str | None = None
    canary: int | None = None
    canary_weight: float = 0.0
    shadow: int | None = None

    def choose(self, sticky: str) -> int:
        """The version for whoever `sticky` names; the same as long as the canary is.

        A larger weight moves people to the canary and nobody away from it.
        """
        if self.canary is None or _share(f"{self.release}\0{self.canary}\0{sticky}") >= self.canary_weight:
            return self.stable
        return self.canary

    def name_of(self, version: int) -> str:
        """Under which workers serve it."""
        return f"{self.release}@v{version}"


class ReleaseDirectory:
    def __init__(self) -> None:
        self.releases: Mapping[str, Release] = {}

    def refresh(self, releases: Iterable[Release]) -> None:
        self.releases = {release.name: release for release in releases}

    def assignment(self, public_name: str) -> Assignment | None:
        """None: it is no name of a release that stands for a version now."""
        try:
            name = parse_name(public_name)
        except InvalidRequestError:
            return None
        release = self.releases.get(name.name)
        if release is None:
            return None
        if name.version is not None or name.digest is not None:
            number = _number_of(release, name)
            return None if number is None else Assignment(release.name, number)
        for alias in release.aliases:
            if alias.alias == (name.alias or DEFAULT_ALIAS):
                return _of_alias(alias)
        return None

    def versions(self) -> Iterator[VersionRecord]:
        for release in self.releases.values():
            yield from release.versions

    def aliases(self) -> Iterator[Alias]:
        for release in self.releases.values():
            yield from release.aliases


def _of_alias(alias: Alias) -> Assignment | None:
    if alias.target.version is None:
        return None
    canary = alias.canary
    return Assignment(
        alias.name,
        alias.target.version,
        alias.alias,
        None if canary is None else canary.version,
        0.0 if canary is None else canary.weight,
        alias.shadow,
    )


def _number_of(release: Release, name: ModelName) -> int | None:
    for version in release.versions:
        if (
            version.state != "failed"
            and name.version in (None, version.number)
            and name.digest in (None, version.digest)
        ):
            return version.number
    return None


def _share(text: str) -> float:
    """A number of [0, 1), evenly spread over texts and always the same for one."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()) / 2**64
