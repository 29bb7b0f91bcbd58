"""Opening the catalog's database: engine settings, durability and migrations.

SQLite runs in WAL mode, so that readers and the one writer do not wait for each other. A committed transaction survives
`kill -9` of the process with any `synchronous` setting, because the operating system holds what was written; FULL also
flushes the WAL at each commit, so that it survives a power failure. The catalog is written a few times a minute at
most, where that flush costs nothing that matters.
"""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from registry.catalog.schema import metadata
from registry.errors import InternalError, InvalidRequestError

_BUSY_TIMEOUT_S = 30.0
_ADVISORY_LOCK = 0x726F6F7467726166  # "rootgraf": taken by every PostgreSQL write, so that writers queue as in SQLite
_BEGIN = "rootgraft_begin"

# alembic keeps the migration that it is running in module globals.
_alembic_lock = threading.Lock()


def open_engine(url: str) -> Engine:
    """Connect and bring the schema to the newest version; two processes may do this at once.

    Raises:
        InvalidRequestError: the URL is not understood or its driver is not installed.
        InternalError: the database cannot be reached, is not a catalog, or is newer than this code.
    """
    parsed = _parse(url)
    engine = _create_engine(parsed)
    try:
        with database_errors(parsed), _opening_lock(parsed):
            if engine.dialect.name == "sqlite":
                _use_wal(engine)
            with write_transaction(engine) as connection:
                migrate(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def write_transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction that is the only writer from its start, so that what it reads still holds when it writes."""
    # SQLite's plain BEGIN takes the write lock only at the first write, and fails at once if another got it meanwhile.
    with engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"}).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        yield connection


@contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Turn the driver's errors into one InternalError that names the database without its password."""
    try:
        yield
    except (DBAPIError, PoolTimeoutError, sqlite3.Error) as error:
        # SQLAlchemy does not wrap what fails while a connection is being set up.
        lines = str(error.orig if isinstance(error, DBAPIError) else error).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise InternalError(f"the catalog {url.render_as_string(hide_password=True)} failed: {reason}") from error


def migrate(connection: Connection, revision: str = "head") -> None:
    """Move the schema to `revision` within the connection's transaction; "base" removes every table.

    Raises:
        InternalError: the database is newer than this code, or holds tables that are not a catalog's.
    """
    config = Config()
    config.set_main_option("script_location", "registry.catalog:migrations")
    config.attributes["connection"] = connection
    with _alembic_lock:
        current = MigrationContext.configure(connection).get_current_revision()
        scripts = ScriptDirectory.from_config(config)
        if current is None:
            _check_foreign_tables(connection)
        else:
            _check_known(scripts, current)
        if revision == "base":
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)


def _check_known(scripts: ScriptDirectory, current: str) -> None:
    try:
        scripts.get_revision(current)
    except CommandError:
        raise InternalError(
            f"the catalog has schema {current}, newer than this rootgraft's {scripts.get_current_head()}; "
            "upgrade rootgraft, or restore the backup made before the newer one ran"
        ) from None


def _check_foreign_tables(connection: Connection) -> None:
    present = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
    if present:
        raise InternalError(
            f"the database has tables {', '.join(present)} that are not a rootgraft catalog's; give another database"
        )


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidRequestError(
            "the database URL is not understood; give sqlite:////absolute/path or postgresql://user:password@host/name",
            param="database",
        ) from None
    backend = parsed.get_backend_name()
    if backend in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or (parsed.database or "").startswith("file:"):
        raise InvalidRequestError(
            f"a catalog cannot live in {backend}: give sqlite:////absolute/path or postgresql://user:password@host/name",
            param="database",
        )
    return parsed


def _create_engine(url: URL) -> Engine:
    try:
        if url.get_backend_name() != "sqlite":
            return create_engine(url, pool_pre_ping=True)
        # An SQLite database in memory is its one connection.
        bounds = {"pool_size": 1, "max_overflow": 0} if _sqlite_file(url) is None else {}
        connect_args = {"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False}
        engine = create_engine(url, connect_args=connect_args, poolclass=QueuePool, **bounds)
    except (ModuleNotFoundError, NoSuchModuleError):
        raise InvalidRequestError(
            "PostgreSQL needs its driver: pip install 'rootgraft[postgres]'", param="database"
        ) from None
    event.listen(engine, "connect", _configure_connection)
    event.listen(engine, "begin", _begin)
    return engine


def _configure_connection(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # None: sqlite3 begins no transactions of its own, `_begin` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))


def _use_wal(engine: Engine) -> None:
    # A setting of the file, outside any transaction. In memory, and on file systems without shared memory, SQLite keeps
    # its rollback journal, which is as durable.
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


@contextmanager
def _opening_lock(url: URL) -> Iterator[None]:
    """Only one process at a time sets up a given SQLite file; the kernel gives the lock back when a process dies.

    SQLite's own lock does not do for this: changing the journal mode fails at once when another connection is open.
    """
    file = _sqlite_file(url)
    if file is None:
        yield
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_name(f"{file.name}.lock").open("w")
    except OSError as error:
        raise InternalError(f"cannot write below {file.parent}: {error.strerror}; give another database") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_file(url: URL) -> Path | None:
    """The file of an SQLite URL; None for a database in memory and for other databases."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database))
