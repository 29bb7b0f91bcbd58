"""The catalog on a real PostgreSQL server, where the machine has one installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from registry.catalog import Catalog
from registry.catalog.database import migrate, open_engine, write_transaction
from registry.catalog.schema import metadata
from registry.errors import InternalError
from registry.names import ModelName, parse_name

DIGEST = "sha256:" + "1" * 64

pytest.importorskip("psycopg")


def _user() -> str:
    """The server refuses to run as root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    return "nobody"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a server of our own on a Unix socket; a path short enough for one."""
    if not shutil.which("initdb") or not shutil.which("postgres"):
        pytest.skip("PostgreSQL's initdb and postgres are not installed")
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        directory, user = Path(name), _user()
        shutil.chown(directory, user)
        subprocess.run(
            ["initdb", "--auth=trust", "--username=postgres", "--no-sync", "--pgdata", f"{name}/data"],
            user=user, cwd=directory, stdout=subprocess.DEVNULL, check=True, timeout=120,
        )  # fmt: skip
        process = subprocess.Popen(
            ["postgres", "-D", f"{name}/data", "-k", name, "-c", "listen_addresses=", "-c", "fsync=off"],
            user=user, cwd=directory, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "ready to accept connections" in line:
                    break
            else:
                pytest.fail("PostgreSQL did not start")
            drain = threading.Thread(target=process.stderr.read, daemon=True)
            drain.start()
            yield f"postgresql://postgres@/postgres?host={name}"
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture
def url(server: str) -> Iterator[str]:
    """An empty database."""
    yield server
    engine = open_engine(server)
    with write_transaction(engine) as connection:
        migrate(connection, "base")
    engine.dispose()


def test_the_migrations_make_the_tables_of_the_schema(url: str) -> None:
    engine = open_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_a_life_of_a_catalog(url: str) -> None:
    with Catalog.open(url) as catalog:
        catalog.upsert_model("smol", family="llama", digest=DIGEST, path="/m", actor="ann")
        record = catalog.upsert_model("smol", family="llama", digest=DIGEST, path="/n", actor="ann")
        catalog.set_alias("smol", "prod", ModelName("smol", digest=DIGEST), actor="ann")
        variant = catalog.add_variant("sql", parent="smol", path="sql", pinned=True, actor="ann")
        variant = catalog.set_variant_digest(variant, DIGEST, actor="worker:w")
        key, plaintext = catalog.create_api_key("laptop", role="admin", actor="ann")
    with Catalog.open(url) as catalog:
        assert catalog.resolve(parse_name("smol@prod")) == record
        assert record.created_at.utcoffset() is not None
        assert catalog.resolve(parse_name(f"sql@{DIGEST}")) == variant
        assert catalog.list_variants() == [variant]
        assert catalog.find_api_key(plaintext) == key
        assert catalog.revoke_api_key(key.id, actor="bob").revoked_at is not None
        assert catalog.find_api_key(plaintext) is None
        newest, *_, first = catalog.audit_entries()
        assert (newest.action, first.action) == ("api_keys.revoke", "models.add")
        assert catalog.audit_entries(subject="smol")[0].detail == {"path": {"from": "/m", "to": "/n"}}


def test_many_open_and_write_at_once(url: str) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with Catalog.open(url) as catalog:
                for _ in range(5):
                    catalog.upsert_model("same", family="llama", digest=DIGEST, path=f"/{number}", actor="test")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Catalog.open(url) as catalog:
        assert [entry.action for entry in catalog.audit_entries()].count("models.add") == 1
        assert len(catalog.audit_entries(limit=1000)) == 20


def test_a_database_that_is_not_there(server: str) -> None:
    with pytest.raises(InternalError, match=r"the catalog postgresql\+psycopg://.* failed: .*does not exist"):
        Catalog.open(server.replace("/postgres?", "/none?"))
