"""Rows of the catalog as values. All times are UTC and carry their time zone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from registry.names import ModelName

Role = Literal["user", "admin"]


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
        name: public name, without alias, version or digest; unique among variants and models.
        kind: "lora": a LoRA adapter in PEFT's format.
        parent: name of the base model; it need not be in the catalog, for not every worker knows its model's digest.
        path: the fine-tune's directory as workers are told it: below their adapter root, or absolute.
        digest: "sha256:…", identity of its files; None until a worker has read them.
        pinned: workers keep it ready to be used at once.
    """

    name: str
    kind: Literal["lora"]
    parent: str
    path: str
    digest: str | None
    pinned: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Alias:
    """`name@alias` stands for `target`: a model or a variant, or one pinned to a digest, never another alias."""

    name: str
    alias: str
    target: ModelName
    updated_at: datetime


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
