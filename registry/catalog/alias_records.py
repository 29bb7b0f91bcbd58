"""Rows of aliases as values."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row

from registry.catalog.records import Alias, Canary
from registry.names import ModelName


def alias_record(row: Row[Any]) -> Alias:
    return Alias(
        row.name,
        row.alias,
        ModelName(row.target_name, version=row.target_version, digest=row.target_digest),
        row.updated_at,
        None if row.canary_version is None else Canary(row.canary_version, row.canary_weight),
        row.shadow_version,
    )
