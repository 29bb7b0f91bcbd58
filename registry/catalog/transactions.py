"""What all operations of the catalog stand on: its database, transactions, and the audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self

from sqlalchemy import Connection, Engine, Table, insert, select

from registry.catalog import schema
from registry.catalog.database import database_errors, open_engine, write_transaction
from registry.errors import InvalidRequestError

Clock = Callable[[], datetime]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class CatalogTransactions:
    """An open database. Every change and its audit entry are one transaction."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    @classmethod
    def open(cls, url: str, *, clock: Clock = _utc_now) -> Self:
        """Open the catalog at an SQLAlchemy URL (SQLite or PostgreSQL), creating or migrating it where needed.

        Raises:
            InvalidRequestError: the URL is not understood or its driver is not installed.
            InternalError: the database cannot be reached, is not a catalog, or is newer than this code.
        """
        return cls(open_engine(url), clock)

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with database_errors(self._engine.url), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with database_errors(self._engine.url), write_transaction(self._engine) as connection:
            yield connection

    def _audit(self, connection: Connection, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        values = {"actor": actor, "action": action, "subject": subject, "detail": dict(detail)}
        connection.execute(insert(schema.audit_log).values(at=self._clock(), **values))

    def _refuse_taken(self, connection: Connection, name: str, *, by: Mapping[str, Table]) -> None:
        """Raises InvalidRequestError when a table of `by`, which are called by what they hold, has `name`."""
        for what, table in by.items():
            if connection.execute(select(table.c.name).where(table.c.name == name)).first():
                raise InvalidRequestError(f"{name} is the name of a {what} already; choose another one", param="name")

    def _refuse_while_aliased(self, connection: Connection, name: str) -> None:
        """Raises InvalidRequestError when an alias points to `name`, which is about to go."""
        pointing = connection.execute(select(schema.aliases).where(schema.aliases.c.target_name == name)).all()
        if pointing:
            names = ", ".join(f"{row.name}@{row.alias}" for row in pointing[:4])
            raise InvalidRequestError(f"{name} still has the alias {names}; move or remove it first", param="model")


def changes(before: object, values: Mapping[str, Any]) -> dict[str, Any]:
    """The detail of an update's audit entry: what differs between a record and the new values of its fields."""
    return {
        key: {"from": getattr(before, key), "to": value}
        for key, value in values.items()
        if getattr(before, key) != value
    }
