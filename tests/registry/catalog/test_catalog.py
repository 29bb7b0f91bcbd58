from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text

from registry.catalog import Catalog
from registry.errors import InternalError, InvalidRequestError, ModelNotFoundError
from registry.names import ModelName, parse_name

D1 = "sha256:" + "1" * 64
D2 = "sha256:" + "2" * 64


class FakeClock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture(params=["memory", "file"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    url = "sqlite://" if request.param == "memory" else f"sqlite:///{tmp_path}/catalog.sqlite3"
    with Catalog.open(url, clock=FakeClock()) as catalog:
        yield catalog


def add(catalog: Catalog, name: str = "smol", digest: str = D1, **values: Any) -> None:
    catalog.upsert_model(name, family="llama", digest=digest, path="/models/smol", actor="test", **values)


def actions(catalog: Catalog) -> list[tuple[str, str]]:
    return [(entry.action, entry.subject) for entry in reversed(catalog.audit_entries())]


def test_add_and_update_a_model(catalog: Catalog) -> None:
    added = catalog.upsert_model(
        "org/smol", family="llama", digest=D1, path="/m", actor="ann", source="a link", chat_template="chatml",
        max_model_len=2048,
    )  # fmt: skip
    assert catalog.get_model("org/smol") == added
    assert (added.kind, added.source, added.chat_template, added.max_model_len) == ("base", "a link", "chatml", 2048)
    assert added.created_at == added.updated_at
    assert added.created_at.tzinfo is not None
    updated = catalog.upsert_model("org/smol", family="llama", digest=D2, path="/m", actor="bob")
    assert (updated.digest, updated.source) == (D2, None)
    assert updated.created_at == added.created_at < updated.updated_at
    newest, first = catalog.audit_entries(subject="org/smol")
    assert (first.actor, first.action, first.detail["digest"]) == ("ann", "models.add", D1)
    assert (newest.actor, newest.action) == ("bob", "models.update")
    assert newest.detail["digest"] == {"from": D1, "to": D2}
    assert "path" not in newest.detail


def test_models_are_listed_by_name(catalog: Catalog) -> None:
    for name in ("b", "a", "c/d"):
        add(catalog, name)
    assert [record.name for record in catalog.list_models()] == ["a", "b", "c/d"]


@pytest.mark.parametrize(("name", "digest"), [("a@b", D1), ("../a", D1), ("", D1), ("a", "sha256:1"), ("a", "")])
def test_a_bad_name_or_digest_changes_nothing(catalog: Catalog, name: str, digest: str) -> None:
    with pytest.raises(InvalidRequestError):
        add(catalog, name, digest)
    assert catalog.list_models() == []
    assert catalog.audit_entries() == []


def test_resolve(catalog: Catalog) -> None:
    add(catalog)
    add(catalog, "other", D2)
    catalog.set_alias("smol", "prod", ModelName("other", digest=D2), actor="test")
    for reference, name in ((f"smol@{D1}", "smol"), ("smol", "smol"), ("smol@prod", "other")):
        assert catalog.resolve(parse_name(reference)).name == name
    for reference in ("none", "smol@none", "smol@v1", f"smol@{D2}", "other@prod"):
        with pytest.raises(ModelNotFoundError):
            catalog.resolve(parse_name(reference))


def test_an_alias_moves_and_is_journaled(catalog: Catalog) -> None:
    add(catalog)
    add(catalog, "other", D2)
    catalog.set_alias("chat", "prod", ModelName("smol"), actor="ann")
    moved = catalog.set_alias("chat", "prod", ModelName("other"), actor="bob")
    assert catalog.list_aliases() == [moved]
    assert catalog.resolve(parse_name("chat@prod")).name == "other"
    newest = catalog.audit_entries(subject="chat@prod")[0]
    assert (newest.actor, newest.detail) == ("bob", {"from": "smol", "to": "other"})


def test_a_pinned_alias_does_not_follow_changed_content(catalog: Catalog) -> None:
    add(catalog)
    catalog.set_alias("smol", "prod", ModelName("smol", digest=D1), actor="test")
    add(catalog, digest=D2)
    with pytest.raises(ModelNotFoundError, match=f"smol now has the digest {D2}"):
        catalog.resolve(parse_name("smol@prod"))


def test_impossible_aliases(catalog: Catalog) -> None:
    add(catalog)
    catalog.set_alias("smol", "a", ModelName("smol"), actor="test")
    for alias, target in (("v1", "smol"), ("a b", "smol"), ("b", "smol@a")):
        with pytest.raises(InvalidRequestError):
            catalog.set_alias("smol", alias, parse_name(target), actor="test")
    for target in ("none", f"smol@{D2}"):
        with pytest.raises(ModelNotFoundError):
            catalog.set_alias("smol", "b", parse_name(target), actor="test")
    with pytest.raises(ModelNotFoundError):
        catalog.remove_alias("smol", "b", actor="test")
    assert len(catalog.list_aliases()) == 1


def test_api_keys(catalog: Catalog) -> None:
    key, plaintext = catalog.create_api_key("laptop", role="user", actor="ann")
    admin, admin_plaintext = catalog.create_api_key("ops", role="admin", actor="ann")
    assert plaintext.startswith(key.prefix)
    assert len(plaintext) > 3 + 40
    assert plaintext != admin_plaintext
    assert catalog.find_api_key(plaintext) == key
    assert catalog.find_api_key(admin_plaintext) == admin
    assert catalog.list_api_keys() == [key, admin]
    for wrong in ("", plaintext[:-1], plaintext + "x", plaintext.upper(), "\ud800", "x" * 10_000, "' or 1=1 --"):
        assert catalog.find_api_key(wrong) is None
    revoked = catalog.revoke_api_key(key.id, actor="bob")
    assert revoked.revoked_at is not None
    assert catalog.revoke_api_key(key.id, actor="eve") == revoked
    assert catalog.find_api_key(plaintext) is None
    assert catalog.find_api_key(admin_plaintext) == admin
    assert actions(catalog) == [
        ("api_keys.create", key.id), ("api_keys.create", admin.id), ("api_keys.revoke", key.id),
    ]  # fmt: skip


def test_bad_api_keys(catalog: Catalog) -> None:
    for name, role in (("", "user"), ("x" * 201, "user"), ("a\nb", "user"), ("a", "root")):
        with pytest.raises(InvalidRequestError):
            catalog.create_api_key(name, role=role, actor="test")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="no API key 'key_none'"):
        catalog.revoke_api_key("key_none", actor="test")


def test_the_secret_is_nowhere_in_the_file(tmp_path: Path) -> None:
    with Catalog.open(f"sqlite:///{tmp_path}/c.sqlite3") as catalog:
        _, plaintext = catalog.create_api_key("laptop", role="user", actor="ann")
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"laptop" in content
    assert plaintext.encode() not in content
    assert plaintext[10:30].encode() not in content


def test_audit_entries_are_newest_first_and_limited(catalog: Catalog) -> None:
    for number in range(5):
        add(catalog, f"m{number}")
    assert [entry.subject for entry in catalog.audit_entries(limit=2)] == ["m4", "m3"]
    (entry,) = catalog.audit_entries(subject="m1")
    assert (entry.action, entry.detail["digest"]) == ("models.add", D1)


def test_a_change_without_its_audit_entry_does_not_happen(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    add(catalog)
    with catalog._engine.begin() as connection:
        connection.execute(text("DROP TABLE audit_log"))
    with pytest.raises(InternalError, match="no such table: audit_log"):
        add(catalog, digest=D2)
    assert catalog.get_model("smol").digest == D1


def test_many_threads_write_at_once(catalog: Catalog) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(5):
                add(catalog, f"m{number}")
                catalog.set_alias(f"m{number}", "prod", ModelName(f"m{number}"), actor=str(step))
                catalog.resolve(parse_name(f"m{number}@prod"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(catalog.list_models()) == 6
    assert len(catalog.audit_entries(limit=1000)) == 60


def test_every_table_of_the_schema_is_there(catalog: Catalog) -> None:
    names = inspect(catalog._engine).get_table_names()
    tables = {"models", "variants", "releases", "versions", "aliases", "api_keys", "audit_log"}
    assert set(names) == tables | {"alembic_version"}
