from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from registry.catalog import Catalog, VariantRecord
from registry.errors import InternalError, InvalidRequestError, ModelNotFoundError
from registry.names import ModelName, parse_name
from tests.registry.catalog.test_catalog import D1, D2, FakeClock, actions, add


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(f"sqlite:///{tmp_path}/catalog.sqlite3", clock=FakeClock()) as catalog:
        yield catalog


def add_variant(catalog: Catalog, name: str = "org/sql", path: str = "sql", **values: bool) -> VariantRecord:
    return catalog.add_variant(name, parent="smol", path=path, actor="ann", **values)


def test_every_change_is_another_revision_and_reading_is_none(catalog: Catalog) -> None:
    revisions = [catalog.revision()]

    def changed() -> bool:
        revisions.append(catalog.revision())
        return revisions[-1] not in revisions[:-1]

    assert revisions == [0]
    record = add_variant(catalog)
    assert changed()
    catalog.list_variants()
    catalog.pin_variant("org/sql", False, actor="ann")  # as it is already
    assert not changed()
    known = catalog.set_variant_digest(record, D1, actor="ann")
    assert changed()
    add_variant(catalog, path="sql-2", replace=True)
    assert changed()
    catalog.restore_variant(known, actor="ann")
    assert changed()
    catalog.remove_variant("org/sql", actor="ann")
    assert changed()


def test_a_life_of_a_variant(catalog: Catalog) -> None:
    added = add_variant(catalog, pinned=True)
    assert (added.parent, added.path, added.digest, added.pinned) == ("smol", "sql", None, True)
    assert added.created_at == added.updated_at
    assert catalog.get_variant("org/sql") == added
    known = catalog.set_variant_digest(added, D1, actor="worker:w")
    assert known == replace(added, digest=D1)
    assert not catalog.pin_variant("org/sql", False, actor="bob").pinned
    assert not catalog.pin_variant("org/sql", False, actor="bob").pinned  # changes nothing, so is not audited
    assert catalog.pin_variant("org/sql", True, actor="bob").pinned
    replaced = add_variant(catalog, path="sql-2", replace=True)
    assert (replaced.path, replaced.digest, replaced.created_at) == ("sql-2", None, added.created_at)
    assert catalog.list_variants() == [replaced]
    assert catalog.remove_variant("org/sql", actor="bob") == replaced
    assert catalog.list_variants() == []
    assert [action for action, _ in actions(catalog)] == [
        "variants.add", "variants.identify", "variants.unpin", "variants.pin", "variants.replace", "variants.remove",
    ]  # fmt: skip
    replacement = catalog.audit_entries(subject="org/sql")[1].detail
    assert replacement["path"] == {"from": "sql", "to": "sql-2"}
    assert replacement["digest"] == {"from": D1, "to": None}


def test_names_are_unique_among_models_and_variants(catalog: Catalog) -> None:
    add(catalog, "base")
    with pytest.raises(InvalidRequestError, match="base is the name of a model"):
        add_variant(catalog, "base")
    add_variant(catalog, "sql")
    with pytest.raises(InvalidRequestError, match="there is a variant sql already"):
        add_variant(catalog, "sql")
    with pytest.raises(InvalidRequestError, match="sql is the name of a variant"):
        add(catalog, "sql")
    assert actions(catalog) == [("models.add", "base"), ("variants.add", "sql")]


@pytest.mark.parametrize(
    ("name", "parent", "path"),
    [("a@b", "m", "p"), ("../a", "m", "p"), ("a", "m@prod", "p"), ("a", "", "p"), ("a", "m", ""), ("a", "m", "p\0q")],
)
def test_what_does_not_fit_changes_nothing(catalog: Catalog, name: str, parent: str, path: str) -> None:
    with pytest.raises(InvalidRequestError):
        catalog.add_variant(name, parent=parent, path=path, actor="ann")
    assert catalog.list_variants() == []
    assert catalog.audit_entries() == []


def test_absent_variants(catalog: Catalog) -> None:
    for call in (
        lambda: catalog.get_variant("none"),
        lambda: catalog.pin_variant("none", True, actor="ann"),
        lambda: catalog.remove_variant("none", actor="ann"),
    ):
        with pytest.raises(ModelNotFoundError, match="'none' does not exist"):
            call()
    assert catalog.audit_entries() == []


def test_names_aliases_and_digests_resolve_to_variants(catalog: Catalog) -> None:
    add(catalog)
    record = catalog.set_variant_digest(add_variant(catalog, "sql"), D2, actor="ann")
    catalog.set_alias("helper", "prod", ModelName("sql"), actor="ann")
    for reference in ("sql", f"sql@{D2}", "helper@prod"):
        assert catalog.resolve(parse_name(reference)) == record
    with pytest.raises(ModelNotFoundError, match="sql now has the digest"):
        catalog.resolve(parse_name(f"sql@{D1}"))
    with pytest.raises(InvalidRequestError, match="sql still has the alias helper@prod"):
        catalog.remove_variant("sql", actor="ann")


def test_a_digest_belongs_to_the_files_that_were_read(catalog: Catalog) -> None:
    first = add_variant(catalog, "sql")
    second = add_variant(catalog, "sql", replace=True)  # the same path, perhaps with other files
    assert catalog.set_variant_digest(first, D1, actor="late").digest is None
    assert catalog.set_variant_digest(second, D2, actor="worker").digest == D2
    assert catalog.set_variant_digest(second, D1, actor="other").digest == D2
    assert catalog.set_variant_digest(first, D1, actor="late", overrule=True).digest == D2
    assert catalog.set_variant_digest(second, D1, actor="who asked", overrule=True).digest == D1
    with pytest.raises(InvalidRequestError):
        catalog.set_variant_digest(second, "md5:1", actor="worker")


def test_what_replaced_a_variant_in_vain_is_taken_back(catalog: Catalog) -> None:
    before = catalog.set_variant_digest(add_variant(catalog, "sql", pinned=True), D1, actor="ann")
    add_variant(catalog, "sql", path="broken", replace=True)
    restored = catalog.restore_variant(before, actor="ann")
    assert restored == catalog.get_variant("sql")
    assert restored == replace(before, updated_at=restored.updated_at)
    assert catalog.audit_entries()[0].detail["path"] == {"from": "broken", "to": "sql"}


def test_a_change_without_its_audit_entry_does_not_happen(catalog: Catalog) -> None:
    record = add_variant(catalog, "sql")
    with catalog._engine.begin() as connection:
        connection.execute(text("DROP TABLE audit_log"))
    for call in (
        lambda: add_variant(catalog, "other"),
        lambda: add_variant(catalog, "sql", replace=True, pinned=True),
        lambda: catalog.set_variant_digest(record, D1, actor="ann"),
        lambda: catalog.pin_variant("sql", True, actor="ann"),
        lambda: catalog.remove_variant("sql", actor="ann"),
    ):
        with pytest.raises(InternalError, match="no such table: audit_log"):
            call()
    assert catalog.list_variants() == [record]
