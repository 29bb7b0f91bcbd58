"""Rows of the catalog as values. All times are UTC and carry their time zone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from registry.names import ModelName
from registry.published_files import VariantKind

Role = Literal["user", "admin"]
VersionState = Literal["rolling_out", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model that can be served.

    Attributes:
        name: public name, without alias, version or digest.
        kind: "base": weights of their own.
        family: name of a `registry.families.ModelFamily`.
        digest: base digest of the checkpoint ("sha256:…"), see `registry.digest`.
        path: the checkpoint on the machine that added it.
        source: where the checkpoint came from, if known.
        chat_template: name of the conversation template to use in place of the checkpoint's own, or None.
        max_model_len: context limit in tokens in place of the checkpoint's own, or None.
    """

    name: str
    kind: Literal["base"]
    family: str
    digest: str
    path: str
    source: str | None
    chat_template: str | None
    max_model_len: int | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class VariantRecord:
    """A fine-tune that every worker of its base model should have.

    Attributes:
        name: public name, without alias or digest; unique among variants and models. That of a release's version is
            name@vN.
        parent: name of the base model; it need not be in the catalog, for not every worker knows its model's digest.
        path: the fine-tune's directory as workers are told it: below their adapter root, or absolute. Of a version, the
            digest of its files, see registry.published_files.
        digest: "sha256:…", identity of its files; None until a worker has read them.
        pinned: workers keep it ready to be used at once.
        files: of a version: the digests of its files by name.
    """

    name: str
    parent: str
    path: str
    digest: str | None
    pinned: bool
    created_at: datetime
    updated_at: datetime
    files: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of a release: a published fine-tune, never changed but for its state.

    Attributes:
        release: public name of the release, unique among models, variants and releases.
        number: counted from 1.
        kind: "lora": a LoRA adapter in PEFT's format; "delta": docs/formats/delta.md.
        parent: as of VariantRecord.
        digest: "sha256:…", of the artifact, see registry.published_files.
        files: their digests by name.
        quality: what its maker measured, as it was told.
        state: rolling_out: workers have not all said yet what they think of it; ready: aliases may point to it; failed:
            no worker should have it.
        error: why it failed.
    """

    release: str
    number: int
    kind: VariantKind
    parent: str
    digest: str
    files: Mapping[str, str]
    quality: Mapping[str, Any] | None
    state: VersionState
    error: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime

    @property
    def name(self) -> str:
        """Under which workers serve it."""
        return f"{self.release}@v{self.number}"


@dataclass(frozen=True, slots=True)
class Canary:
    """A share of an alias's requests, `weight` of 0 to 1, goes to another version of the release."""

    version: int
    weight: float


@dataclass(frozen=True, slots=True)
class Alias:
    """`name@alias` stands for `target`: a model, a variant or a version of the release `name`, never another alias.

    A model or variant may be pinned to a digest. Aliases of releases may have the rest:

    Attributes:
        canary: who gets another version than the target.
        shadow: a version that is asked the same as the target, and whose answers are compared and dropped.
    """

    name: str
    alias: str
    target: ModelName
    updated_at: datetime
    canary: Canary | None = None
    shadow: int | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Versions by number, aliases by name."""

    name: str
    created_at: datetime
    versions: tuple[VersionRecord, ...]
    aliases: tuple[Alias, ...]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key without its secret. `prefix` is its readable beginning, for telling keys apart in a list."""

    id: str
    name: str
    prefix: str
    role: Role
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who did what to which thing. `action` is `<table>.<verb>`; `detail` never holds a secret."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: Mapping[str, Any]
