"""Public model names: one grammar, one parse function.

    reference = name | name "@" alias | name "@v" N | name "@sha256:" 64 hex digits
    name      = segment *("/" segment)               at most 200 characters
    segment   = (letter | digit) *(letter | digit | "." | "_" | "-")
    alias     = as segment, at most 64 characters, and not "v" followed by digits
    N         = 1 … 999999999 without leading zeros
    hex digit = 0-9 a-f                              lower case, so that one thing has one spelling

No segment can be empty, begin with a dot or hold a backslash, so a name is also a safe relative path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from registry.errors import InvalidRequestError

MAX_NAME_LENGTH = 200

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_ALIAS = re.compile(r"(?!v[0-9]+\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed reference; at most one of alias, version and digest is set. `str()` gives the text back.

    Attributes:
        name: the model's name.
        alias: a movable label such as "prod".
        version: a published version, counted from 1.
        digest: "sha256:" and 64 lower-case hex digits.

    Raises:
        InvalidRequestError: a part does not fit the grammar.
    """

    name: str
    alias: str | None = None
    version: int | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise _invalid(self.name, "a name is letters, digits and . _ - in segments joined by /")
        if sum(part is not None for part in (self.alias, self.version, self.digest)) > 1:
            raise _invalid(self.name, "give one of alias, version and digest")
        if self.alias is not None and not is_alias(self.alias):
            raise _invalid(self.alias, "an alias is up to 64 letters, digits and . _ - and not v with a number")
        if self.version is not None and not 1 <= self.version < 10**9:
            raise _invalid(f"v{self.version}", "versions count from 1")
        if self.digest is not None and not is_digest(self.digest):
            raise _invalid(self.digest, "a digest is sha256: and 64 lower-case hex digits")

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@v{self.version}"
        reference = self.alias or self.digest
        return f"{self.name}@{reference}" if reference else self.name


def parse_name(text: str) -> ModelName:
    """Parse a public model name; `str(parse_name(text)) == text` for every text that is accepted.

    Raises:
        InvalidRequestError: the text does not fit the grammar.
    """
    name, at, reference = text.partition("@")
    if not at:
        return ModelName(name)
    if version := _VERSION.fullmatch(reference):
        return ModelName(name, version=int(version[1]))
    if reference.startswith("sha256:"):
        return ModelName(name, digest=reference)
    return ModelName(name, alias=reference)


def is_name(text: str) -> bool:
    return len(text) <= MAX_NAME_LENGTH and _NAME.fullmatch(text) is not None


def is_variant_name(text: str) -> bool:
    """A plain name, or a version of one (name@vN): what workers serve variants as."""
    name, at, reference = text.partition("@")
    return len(text) <= MAX_NAME_LENGTH and is_name(name) and (not at or _VERSION.fullmatch(reference) is not None)


def is_alias(text: str) -> bool:
    return _ALIAS.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def _invalid(text: str, rule: str) -> InvalidRequestError:
    # The text comes from a client: escaped and cut, so that it cannot forge a log line.
    return InvalidRequestError(f"invalid model name {text[:80]!a}: {rule}", param="model")
