"""The catalog: what this installation serves and who may use it, in a database that outlives every process."""

from registry.catalog.aliases import DEFAULT_ALIAS
from registry.catalog.catalog import Catalog
from registry.catalog.records import (
    Alias,
    ApiKey,
    AuditEntry,
    Canary,
    ModelRecord,
    Release,
    Role,
    VariantRecord,
    VersionRecord,
    VersionState,
)

__all__ = [
    "DEFAULT_ALIAS",
    "Alias",
    "ApiKey",
    "AuditEntry",
    "Canary",
    "Catalog",
    "ModelRecord",
    "Release",
    "Role",
    "VariantRecord",
    "VersionRecord",
    "VersionState",
]
