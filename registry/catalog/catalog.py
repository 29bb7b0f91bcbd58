"""The catalog's operations. Each change and its audit entry are one transaction."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, get_args

from sqlalchemy import Row, insert, select, update

from registry.catalog import schema
from registry.catalog.aliases import AliasOperations
from registry.catalog.records import ApiKey, AuditEntry, Role
from registry.errors import InvalidRequestError

_KEY_PREFIX = "rg-"
_KEY_BYTES = 32


class Catalog(AliasOperations):
    """An open catalog; safe to use from several threads, and with other processes on the same database.

    `actor` of a changing method is who asked for it: an API key's id, or "cli:" and a user name. Every method raises
    InternalError when the database fails; nothing is changed then.
    """

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

    def audit_entries(self, *, subject: str | None = None, limit: int = 100) -> list[AuditEntry]:
        """The newest entries first, of one subject or of all."""
        statement = select(schema.audit_log).order_by(schema.audit_log.c.id.desc()).limit(limit)
        if subject is not None:
            statement = statement.where(schema.audit_log.c.subject == subject)
        with self._read() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(statement)]


def _key_record(row: Row[Any]) -> ApiKey:
    return ApiKey(row.id, row.name, row.prefix, row.role, row.created_at, row.revoked_at)


def _key_hash(plaintext: str) -> str:
    # A client can send any text; a surrogate that UTF-8 cannot hold still has to give a hash, of no key.
    return hashlib.sha256(plaintext.encode("utf-8", "surrogatepass")).hexdigest()
