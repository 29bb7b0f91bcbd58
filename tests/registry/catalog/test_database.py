from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from registry.catalog import Catalog
from registry.catalog.database import migrate, open_engine, write_transaction
from registry.catalog.schema import metadata
from registry.errors import InternalError, InvalidRequestError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state/catalog.sqlite3"


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_the_migrations_make_the_tables_of_the_schema(url: str) -> None:
    engine = open_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_down_to_nothing_and_up_again(url: str) -> None:
    engine = open_engine(url)
    for revision, tables in (("base", {"alembic_version"}), ("head", {*metadata.tables, "alembic_version"})):
        with write_transaction(engine) as connection:
            migrate(connection, revision)
        assert set(inspect(engine).get_table_names()) == tables
    engine.dispose()


def test_an_older_catalog_keeps_its_variants(url: str) -> None:
    engine = open_engine(url)
    with write_transaction(engine) as connection:
        migrate(connection, "base")
        migrate(connection, "0003")
        now = "2026-11-01 00:00:00"
        connection.execute(
            text("INSERT INTO variants VALUES ('sql', 'lora', 'm', 'adapters/sql', NULL, true, :now, :now, NULL)"),
            {"now": now},
        )
    engine.dispose()
    with Catalog.open(url) as catalog:
        (record,) = catalog.list_variants()
    assert (record.name, record.parent, record.path, record.pinned) == ("sql", "m", "adapters/sql", True)


def test_durability_settings(url: str) -> None:
    engine = open_engine(url)
    with engine.connect() as connection:
        settings = [connection.execute(text(f"PRAGMA {name}")).scalar_one() for name in (
            "journal_mode", "foreign_keys", "synchronous")]  # fmt: skip
    assert settings == ["wal", 1, 2]
    engine.dispose()


def test_a_migration_that_fails_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import op

    def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("broken migration")

    monkeypatch.setattr(op, "create_index", fail)
    with pytest.raises(InternalError, match="broken migration"):
        open_engine(url)
    monkeypatch.undo()
    engine = create_engine(url)
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    Catalog.open(url).close()


def test_a_newer_database_is_refused_and_untouched(url: str) -> None:
    Catalog.open(url).close()
    path = Path(url.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(InternalError, match=r"schema 9999, newer than this rootgraft's .*; upgrade rootgraft"):
        Catalog.open(url)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_somebody_elses_database_is_refused(url: str, tmp_path: Path) -> None:
    path = Path(url.removeprefix("sqlite:///"))
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE models (id INTEGER)")
    with pytest.raises(InternalError, match="tables models that are not a rootgraft catalog's"):
        Catalog.open(url)
    (tmp_path / "text").write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(InternalError, match="file is not a database"):
        Catalog.open(f"sqlite:///{tmp_path}/text")


@pytest.mark.parametrize(
    "bad", ["", "nonsense", "mysql://host/name", "oracle://x", "sqlite:///file:x?mode=memory&uri=true"]
)
def test_urls_that_cannot_be_used(bad: str) -> None:
    with pytest.raises(InvalidRequestError, match="postgresql://user:password@host/name") as caught:
        Catalog.open(bad)
    assert caught.value.param == "database"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InternalError, match="cannot write below"):
        Catalog.open(f"sqlite:///{tmp_path}/file/catalog.sqlite3")


def test_the_password_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(InternalError) as caught:
        Catalog.open("postgresql://user:hunter2@127.0.0.1:1/name")
    assert "hunter2" not in caught.value.message


OPEN = """
import sys
from registry.catalog import Catalog
print("ready", flush=True)
sys.stdin.readline()
with Catalog.open(sys.argv[1]) as catalog:
    catalog.create_api_key("key", role="user", actor=sys.argv[2])
"""


def test_processes_that_open_a_new_catalog_at_once(url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, url, str(number)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    with Catalog.open(url) as catalog:
        assert {entry.actor for entry in catalog.audit_entries()} == {"0", "1", "2", "3"}


WRITE_FOR_EVER = """
import itertools, sys
from registry.catalog import Catalog
catalog = Catalog.open(sys.argv[1])
for number in itertools.count():
    catalog.upsert_model("m", family="llama", digest=f"sha256:{number:064x}", path="/m", actor="writer")
    print(number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_committed(url: str) -> None:
    for _ in range(3):
        process = run(WRITE_FOR_EVER, url)
        assert process.stdout is not None
        for number in range(40):
            assert process.stdout.readline() == f"{number}\n"
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == -signal.SIGKILL
        # A last line may have been cut off by the kill: only whole lines are promises.
        committed = int(rest.split("\n")[-2]) if "\n" in rest else 39
        with Catalog.open(url) as catalog:
            stored = int(catalog.get_model("m").digest.removeprefix("sha256:"), 16)
            newest = catalog.audit_entries(limit=1)[0]
            # The transaction after the last promise may have been committed before its promise was printed.
            assert stored in (committed, committed + 1)
            assert newest.action in ("models.add", "models.update")
            digest = newest.detail["digest"]
            assert (digest if isinstance(digest, str) else digest["to"]) == f"sha256:{stored:064x}"
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
