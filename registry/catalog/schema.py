"""Tables of the catalog as the newest migration leaves them; a test compares the two."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator

from registry.names import MAX_NAME_LENGTH


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime. SQLite has no time zones, so UTC goes in and comes out of both databases."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without time zone cannot be stored")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Constraints have names so that later migrations can change them on both databases.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

models = Table(
    "models",
    metadata,
    Column("name", String(MAX_NAME_LENGTH), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("family", String(64), nullable=False),
    Column("digest", String(71), nullable=False),
    Column("path", Text, nullable=False),
    Column("source", Text),
    Column("chat_template", Text),
    Column("max_model_len", Integer),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

variants = Table(
    "variants",
    metadata,
    Column("name", String(MAX_NAME_LENGTH), primary_key=True),
    Column("parent", String(MAX_NAME_LENGTH), nullable=False),
    Column("path", Text, nullable=False),
    Column("digest", String(71)),
    Column("pinned", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("files", JSON(none_as_null=True)),
)

releases = Table(
    "releases",
    metadata,
    Column("name", String(MAX_NAME_LENGTH), primary_key=True),
    Column("last_number", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("release", String(MAX_NAME_LENGTH), ForeignKey("releases.name"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("parent", String(MAX_NAME_LENGTH), nullable=False),
    Column("digest", String(71), nullable=False),
    Column("files", JSON, nullable=False),
    Column("quality", JSON(none_as_null=True)),
    Column("state", String(16), nullable=False),
    Column("error", Text),
    Column("created_by", String(200), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", String(MAX_NAME_LENGTH), primary_key=True),
    Column("alias", String(64), primary_key=True),
    Column("target_name", String(MAX_NAME_LENGTH), nullable=False),
    Column("target_digest", String(71)),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("target_version", Integer),
    Column("canary_version", Integer),
    Column("canary_weight", Float),
    Column("shadow_version", Integer),
    Index("ix_aliases_target_name", "target_name"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("prefix", String(16), nullable=False),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    Index("ix_api_keys_hash", "hash", unique=True),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(400), nullable=False),
    Column("detail", JSON, nullable=False),
    Index("ix_audit_log_subject", "subject"),
)
