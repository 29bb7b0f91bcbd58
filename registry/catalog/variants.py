"""The variants that workers should have."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from registry.catalog import schema
from registry.catalog.records import VariantRecord
from registry.catalog.transactions import CatalogTransactions, changes
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import ModelName, is_digest

_TABLE = schema.variants


class VariantOperations(CatalogTransactions):
    def add_variant(
        self,
        name: str,
        *,
        parent: str,
        path: str,
        actor: str,
        pinned: bool = False,
        replace: bool = False,
    ) -> VariantRecord:
        """Want a variant on all workers of `parent`. Its digest is unknown until a worker has read it.

        Args:
            replace: one of that name may be there and is then replaced; its time of creation stays.

        Raises:
            InvalidRequestError: a name does not fit the grammar, the path is empty, a model or a release has the name,
                or a variant has it and `replace` is not given.
        """
        name, parent = ModelName(name).name, ModelName(parent).name
        if not path or "\0" in path:
            raise InvalidRequestError("the path of a variant must not be empty or hold a NUL", param="path")
        values: dict[str, Any] = {"parent": parent, "path": path, "digest": None, "pinned": pinned}
        with self._write() as connection:
            self._refuse_taken(connection, name, by={"model": schema.models, "release": schema.releases})
            now = self._clock()
            before = self._variant(connection, name)
            if before is None:
                connection.execute(insert(_TABLE).values(name=name, created_at=now, updated_at=now, **values))
                self._audit(connection, actor, "variants.add", name, values)
            elif replace:
                connection.execute(update(_TABLE).where(_TABLE.c.name == name).values(updated_at=now, **values))
                self._audit(connection, actor, "variants.replace", name, changes(before, values))
            else:
                raise InvalidRequestError(
                    f"there is a variant {name} already; load_inplace (on the command line --replace) replaces it",
                    param="name",
                )
            return self._require_variant(connection, name)

    def restore_variant(self, record: VariantRecord, *, actor: str) -> VariantRecord:
        """Want a variant again as it was before it was replaced, because what replaced it cannot be had.

        Raises:
            ModelNotFoundError: it was removed meanwhile.
        """
        values = {
            "parent": record.parent, "path": record.path, "digest": record.digest, "pinned": record.pinned
        }  # fmt: skip
        with self._write() as connection:
            before = self._require_variant(connection, record.name)
            statement = update(_TABLE).where(_TABLE.c.name == record.name)
            connection.execute(statement.values(updated_at=self._clock(), **values))
            self._audit(connection, actor, "variants.restore", record.name, changes(before, values))
            return self._require_variant(connection, record.name)

    def set_variant_digest(
        self, record: VariantRecord, digest: str, *, actor: str, overrule: bool = False
    ) -> VariantRecord:
        """Note the identity of a variant's files, unless it is known or the variant has changed since `record`.

        Args:
            overrule: for who asked for the files to be read: also if another controller has noted another digest.

        Raises:
            InvalidRequestError: the digest does not fit the grammar.
            ModelNotFoundError: the variant is no longer wanted.
        """
        if not is_digest(digest):
            raise InvalidRequestError(f"{digest[:80]!a} is no digest: give sha256: and 64 lower-case hex digits")
        with self._write() as connection:
            found = self._require_variant(connection, record.name)
            unchanged = (found.path, found.updated_at) == (record.path, record.updated_at)
            if unchanged and found.digest != digest and (overrule or found.digest is None):
                connection.execute(update(_TABLE).where(_TABLE.c.name == record.name).values(digest=digest))
                self._audit(connection, actor, "variants.identify", record.name, {"digest": digest})
            return self._require_variant(connection, record.name)

    def pin_variant(self, name: str, pinned: bool, *, actor: str) -> VariantRecord:
        """Want a variant to be kept ready, or no longer.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        with self._write() as connection:
            before = self._require_variant(connection, name)
            if before.pinned != pinned:
                statement = update(_TABLE).where(_TABLE.c.name == name)
                connection.execute(statement.values(pinned=pinned, updated_at=self._clock()))
                self._audit(connection, actor, "variants.pin" if pinned else "variants.unpin", name, {})
            return self._require_variant(connection, name)

    def remove_variant(self, name: str, *, actor: str) -> VariantRecord:
        """Want it no longer; its files stay. -> what was known of it

        Raises:
            ModelNotFoundError: there is none of that name.
            InvalidRequestError: an alias still points to it, or it is a version of a release.
        """
        with self._write() as connection:
            record = self._require_variant(connection, name)
            if record.files is not None:
                raise InvalidRequestError(f"{name} is a version of a release; remove it there", param="name")
            self._refuse_while_aliased(connection, name)
            connection.execute(delete(_TABLE).where(_TABLE.c.name == name))
            detail = {"parent": record.parent, "path": record.path, "digest": record.digest}
            self._audit(connection, actor, "variants.remove", name, detail)
            return record

    def get_variant(self, name: str) -> VariantRecord:
        """Raises ModelNotFoundError when there is none of that name."""
        with self._read() as connection:
            return self._require_variant(connection, name)

    def revision(self) -> int:
        """A number that every change of the catalog changes: that of the newest entry of the audit log."""
        with self._read() as connection:
            return connection.execute(select(func.max(schema.audit_log.c.id))).scalar() or 0

    def list_variants(self) -> list[VariantRecord]:
        """All variants by name."""
        with self._read() as connection:
            return [VariantRecord(**row._mapping) for row in connection.execute(select(_TABLE).order_by(_TABLE.c.name))]

    def _variant(self, connection: Connection, name: str) -> VariantRecord | None:
        row = connection.execute(select(_TABLE).where(_TABLE.c.name == name)).one_or_none()
        return None if row is None else VariantRecord(**row._mapping)

    def _require_variant(self, connection: Connection, name: str) -> VariantRecord:
        record = self._variant(connection, name)
        if record is None:
            raise ModelNotFoundError(f"the variant {name[:200]!a} does not exist; list the variants", param="name")
        return record
