"""The catalog's operations. Each change and its audit entry are one transaction."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select, update

from registry.catalog import schema
from registry.catalog.records import Alias, ApiKey, AuditEntry, ModelRecord, Role, VariantRecord
from registry.catalog.transactions import changes
from registry.catalog.variants import VariantOperations
from registry.errors import InvalidRequestError, ModelNotFoundError
from registry.names import ModelName

_KEY_PREFIX = "rg-"
_KEY_BYTES = 32


class Catalog(VariantOperations):
    """An open catalog; safe to use from several threads, and with other processes on the same database.

    `actor` of a changing method is who asked for it: an API key's id, or "cli:" and a user name. Every method raises
    InternalError when the database fails; nothing is changed then.
    """

    # Models

    def upsert_model(
        self,
        name: str,
        *,
        family: str,
        digest: str,
        path: str,
        actor: str,
        kind: Literal["base"] = "base",
        source: str | None = None,
        chat_template: str | None = None,
        max_model_len: int | None = None,
    ) -> ModelRecord:
        """Add the model, or replace what is known of it; its time of creation stays.

        Raises:
            InvalidRequestError: name or digest do not fit the grammar, or a variant has the name.
        """
        name = ModelName(name, digest=digest).name
        values: dict[str, Any] = {
            "kind": kind, "family": family, "digest": digest, "path": path, "source": source,
            "chat_template": chat_template, "max_model_len": max_model_len,
        }  # fmt: skip
        with self._write() as connection:
            now = self._clock()
            if self._variant(connection, name) is not None:
                raise InvalidRequestError(
                    f"{name} is the name of a variant; give the model another one, or remove the variant", param="model"
                )
            before = self._model(connection, name)
            if before is None:
                connection.execute(insert(schema.models).values(name=name, created_at=now, updated_at=now, **values))
                detail: dict[str, Any] = values
            else:
                statement = update(schema.models).where(schema.models.c.name == name)
                connection.execute(statement.values(updated_at=now, **values))
                detail = changes(before, values)
            self._audit(connection, actor, "models.add" if before is None else "models.update", name, detail)
            record = self._model(connection, name)
        assert record is not None
        return record

    def get_model(self, name: str) -> ModelRecord:
        """Raises ModelNotFoundError when there is none of that name."""
        with self._read() as connection:
            return self._require_model(connection, name)

    def list_models(self) -> list[ModelRecord]:
        """All models by name."""
        with self._read() as connection:
            rows = connection.execute(select(schema.models).order_by(schema.models.c.name))
            return [ModelRecord(**row._mapping) for row in rows]

    def remove_model(self, name: str, *, actor: str) -> None:
        """Forget the model; its files stay.

        Raises:
            ModelNotFoundError: there is none of that name.
            InvalidRequestError: an alias still points to it.
        """
        with self._write() as connection:
            record = self._require_model(connection, name)
            self._refuse_while_aliased(connection, name)
            connection.execute(delete(schema.models).where(schema.models.c.name == name))
            self._audit(connection, actor, "models.remove", name, {"digest": record.digest, "path": record.path})

    # Aliases and names

    def set_alias(self, name: str, alias: str, target: ModelName, *, actor: str) -> Alias:
        """Make `name@alias` stand for `target`, in one step for every reader.

        Raises:
            InvalidRequestError: name or alias do not fit the grammar, or the target is an alias or a version.
            ModelNotFoundError: the target does not exist now.
        """
        subject = ModelName(name, alias=alias)
        if target.alias is not None or target.version is not None:
            raise InvalidRequestError(f"an alias points to a model or a digest, not to {target}", param="target")
        with self._write() as connection:
            self._resolve(connection, target)
            before = self._alias(connection, subject)
            if before is not None:
                connection.execute(delete(schema.aliases).where(*_is_alias(subject)))
            row = {"name": name, "alias": alias, "target_name": target.name, "target_digest": target.digest}
            connection.execute(insert(schema.aliases).values(updated_at=self._clock(), **row))
            detail = {"from": None if before is None else str(before.target), "to": str(target)}
            self._audit(connection, actor, "aliases.set", str(subject), detail)
            record = self._alias(connection, subject)
        assert record is not None
        return record

    def remove_alias(self, name: str, alias: str, *, actor: str) -> None:
        """Raises ModelNotFoundError when there is no such alias."""
        subject = ModelName(name, alias=alias)
        with self._write() as connection:
            before = self._alias(connection, subject)
            if before is None:
                raise _not_found(subject)
            connection.execute(delete(schema.aliases).where(*_is_alias(subject)))
            self._audit(connection, actor, "aliases.remove", str(subject), {"from": str(before.target)})

    def list_aliases(self) -> list[Alias]:
        """All aliases by name."""
        with self._read() as connection:
            order = schema.aliases.c.name, schema.aliases.c.alias
            return [_alias_record(row) for row in connection.execute(select(schema.aliases).order_by(*order))]

    def resolve(self, name: ModelName) -> ModelRecord | VariantRecord:
        """The model or variant that a public name stands for now.

        Raises:
            ModelNotFoundError: there is no such model, variant, alias or version, or it has another digest by now.
        """
        with self._read() as connection:
            return self._resolve(connection, name)

    # API keys

    def create_api_key(self, name: str, *, role: Role, actor: str) -> tuple[ApiKey, str]:
        """A new key and its plain text, which is stored nowhere and cannot be shown again.

        Only the SHA-256 of the text is stored. Slow, salted hashes protect passwords, which can be guessed; a key is 32
        random bytes, so that guessing is hopeless at any speed, and a fast hash keeps the check of each request cheap
        and lets an index find the key.

        Raises:
            InvalidRequestError: the name is empty or longer than 200 characters, or the role is unknown.
        """
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise InvalidRequestError("a key's name is 1 to 200 printable characters", param="name")
        if role not in get_args(Role):
            raise InvalidRequestError(f"a key's role is user or admin, not {role!r}", param="role")
        plaintext = _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        key = ApiKey(f"key_{secrets.token_hex(8)}", name, plaintext[:9], role, self._clock(), None)
        with self._write() as connection:
            values = {"name": key.name, "prefix": key.prefix, "role": key.role, "created_at": key.created_at}
            connection.execute(insert(schema.api_keys).values(id=key.id, hash=_key_hash(plaintext), **values))
            self._audit(connection, actor, "api_keys.create", key.id, {"name": name, "role": role})
        return key, plaintext

    def find_api_key(self, plaintext: str) -> ApiKey | None:
        """The key of that text, unless it is unknown or revoked.

        The index is searched for the hash, so that its timing tells a guesser about hashes only, which say nothing
        about keys; what it finds is compared in constant time.
        """
        digest = _key_hash(plaintext)
        with self._read() as connection:
            row = connection.execute(select(schema.api_keys).where(schema.api_keys.c.hash == digest)).one_or_none()
        if row is None or not hmac.compare_digest(row.hash, digest) or row.revoked_at is not None:
            return None
        return _key_record(row)

    def list_api_keys(self) -> list[ApiKey]:
        """All keys, revoked ones too, oldest first."""
        with self._read() as connection:
            order = schema.api_keys.c.created_at, schema.api_keys.c.id
            return [_key_record(row) for row in connection.execute(select(schema.api_keys).order_by(*order))]

    def revoke_api_key(self, key_id: str, *, actor: str) -> ApiKey:
        """Refuse the key from now on; one that is revoked already stays as it is.

        Raises:
            InvalidRequestError: there is no key of that id.
        """
        table = schema.api_keys
        with self._write() as connection:
            row = connection.execute(select(table).where(table.c.id == key_id)).one_or_none()
            if row is None:
                raise InvalidRequestError(
                    f"there is no API key {key_id[:80]!a}; list the keys for their ids", param="id"
                )
            if row.revoked_at is None:
                connection.execute(update(table).where(table.c.id == key_id).values(revoked_at=self._clock()))
                self._audit(connection, actor, "api_keys.revoke", key_id, {"name": row.name})
            return _key_record(connection.execute(select(table).where(table.c.id == key_id)).one())

    # Audit

    def append_audit(self, actor: str, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Record something that changed outside the catalog; the catalog's own changes record themselves."""
        with self._write() as connection:
            self._audit(connection, actor, action, subject, detail)

    def audit_entries(self, *, subject: str | None = None, limit: int = 100) -> list[AuditEntry]:
        """The newest entries first, of one subject or of all."""
        statement = select(schema.audit_log).order_by(schema.audit_log.c.id.desc()).limit(limit)
        if subject is not None:
            statement = statement.where(schema.audit_log.c.subject == subject)
        with self._read() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(statement)]

    # Within a transaction

    def _model(self, connection: Connection, name: str) -> ModelRecord | None:
        row = connection.execute(select(schema.models).where(schema.models.c.name == name)).one_or_none()
        return None if row is None else ModelRecord(**row._mapping)

    def _require_model(self, connection: Connection, name: str) -> ModelRecord:
        record = self._model(connection, name)
        if record is None:
            raise _not_found(ModelName(name))
        return record

    def _alias(self, connection: Connection, name: ModelName) -> Alias | None:
        row = connection.execute(select(schema.aliases).where(*_is_alias(name))).one_or_none()
        return None if row is None else _alias_record(row)

    def _resolve(self, connection: Connection, name: ModelName) -> ModelRecord | VariantRecord:
        if name.version is not None:
            raise _not_found(name)
        if name.alias is not None:
            alias = self._alias(connection, name)
            if alias is None:
                raise _not_found(name)
            name = alias.target
        record = self._variant(connection, name.name) or self._require_model(connection, name.name)
        if name.digest is not None and name.digest != record.digest:
            raise ModelNotFoundError(
                f"the model {str(name)!r} does not exist: {name.name} now has the digest {record.digest}", param="model"
            )
        return record


def _is_alias(name: ModelName) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return schema.aliases.c.name == name.name, schema.aliases.c.alias == name.alias


def _alias_record(row: Row[Any]) -> Alias:
    return Alias(row.name, row.alias, ModelName(row.target_name, digest=row.target_digest), row.updated_at)


def _key_record(row: Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.name, row.prefix, row.role, row.created_at, row.revoked_at)


def _key_hash(plaintext: str) -> str:
    # A client can send any text; a surrogate that UTF-8 cannot hold still has to give a hash, of no key.
    return hashlib.sha256(plaintext.encode("utf-8", "surrogatepass")).hexdigest()


def _not_found(name: ModelName) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {str(name)!r} does not exist; list the models to see what does", param="model"
    )
